"""`CachedImage`: an image on its way from bytes to visual tokens, shared by all rows that show it.

Rows with the same image bytes are decoded, encoded and compressed once. Methods do not look at the
text (those that do say so), so what is kept is the same for every question about the image. Methods
that draw at random do so by the image's content, for the same reason.

A picture lives as long as a row needs it, and those used last a little longer, within `bytes`.

Not covered: images that look alike but differ in a byte.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.errors import BadRow
from gc2ray.core.records import RECIPES_POLICY
from gc2ray.models.image_processor import Tiles


@dataclass(eq=False)
class CachedImage:
    """An image, and what became of it so far.

    Attributes:
        key: Digest of its bytes, and of the prompt where the method reads that.
        decoded: Set once `tiles` or `trouble` is known.
        tiles: Its views as bytes, until it is encoded.
        packed: What the language model is to read of it, (K, D).
        places: Where that stood in the uncompressed image, or None.
        way: How it is to be compressed.
        mask: Which tokens were kept, a bitmap for each view.
        trouble: Why it cannot be used.
        oom_splits: Times that memory was short for it and others, which were halved.
        rows: Rows that showed it so far.
    """

    key: str
    policy: str = RECIPES_POLICY
    mask: tuple[bytes, ...] = ()
    decoded: threading.Event = field(default_factory=threading.Event)
    tiles: Tiles | None = None
    packed: Tensor | None = None
    places: OriginalPositions | None = None
    trouble: BadRow | None = None
    retry: bool = False
    oom_splits: int = 0
    rows: int = 0
    kept_per_view: tuple[int, ...] = ()
    full_per_view: tuple[int, ...] = ()
    newlines: int = 0
    full_newlines: int = 0

    @property
    def seed(self) -> int:
        """A seed that depends on the image only, never on its row, batch or worker."""
        return int(self.key[:14], 16)

    @property
    def views(self) -> int:
        """Views that are still to be encoded."""
        return 0 if self.tiles is None else len(self.tiles.pixels)

    @property
    def full_tokens(self) -> int:
        """Visual tokens before compression."""
        return sum(self.full_per_view)

    def count(self, views: Views, selection: Selection) -> None:
        """Note what the compressor kept: counted, never claimed."""
        self.full_per_view = views.valid_per_view
        views_count = len(self.full_per_view)
        selection = Selection(selection.source.cpu())  # once
        self.kept_per_view = selection.kept_per_view(views_count, views.tokens_per_view)
        self.mask = selection.bitmaps(views_count, views.tokens_per_view)
        self.newlines = len(selection.source) - sum(self.kept_per_view)
        self.full_newlines = views.canvas.newlines


def image_key(data: bytes, prompt: str | None = None, policy: str = RECIPES_POLICY) -> str:
    """Digest of an image's bytes; with the prompt, where what is kept depends on it.

    The same image compressed in another way is another picture.
    """
    digest = hashlib.blake2b(data, digest_size=16)
    if prompt is not None:
        digest.update(hashlib.blake2b(prompt.encode(), digest_size=16).digest())
    return digest.hexdigest() + ("" if policy == RECIPES_POLICY else f"/{policy}")


class ImageCache:
    """The pictures that are in use, and those used last.

    Args:
        kept_bytes: Packed tokens of pictures that no row needs any more, at most.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._known: WeakValueDictionary[str, CachedImage] = WeakValueDictionary()
        self._kept: OrderedDict[str, CachedImage] = OrderedDict()  # used longest ago first
        self._bytes = 0  # of those
        self._lock = threading.Lock()

    def find(self, key: str, policy: str = RECIPES_POLICY) -> tuple[CachedImage, bool]:
        """The picture of a key, and whether it is new: then the caller is to decode it."""
        with self._lock:
            cached_image = self._known.get(key)
            new = cached_image is None
            if cached_image is None:
                cached_image = self._known[key] = CachedImage(key, policy)
            cached_image.rows += 1
            if key in self._kept:
                self._kept.move_to_end(key)
            return cached_image, new

    def keep(self, cached_image: CachedImage) -> None:
        """Remember an encoded picture for rows to come, at the cost of those used longest ago."""
        with self._lock:
            self._drop(cached_image.key)
            self._kept[cached_image.key] = cached_image
            self._bytes += _bytes(cached_image)
            while self._bytes > self._kept_bytes:
                self._drop(next(iter(self._kept)))

    def discard(self, cached_image: CachedImage) -> None:
        """Let rows to come try anew: what went wrong with it may not be its own fault."""
        with self._lock:
            self._drop(cached_image.key)
            if self._known.get(cached_image.key) is cached_image:
                del self._known[cached_image.key]

    def _drop(self, key: str) -> None:
        cached_image = self._kept.pop(key, None)
        self._bytes -= 0 if cached_image is None else _bytes(cached_image)


def _bytes(cached_image: CachedImage) -> int:
    return 0 if cached_image.packed is None else cached_image.packed.nbytes

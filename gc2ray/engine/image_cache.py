"""`CachedImage`: an image from its bytes to its visual tokens, shared by all rows that show it.

Rows with the same image bytes are decoded, encoded and compressed once. Methods do not read the
prompt (those that do declare it), so the same tokens are kept for every prompt about the image.
Methods that choose at random are seeded by the image's content, for the same reason.

An image stays in memory as long as a row needs it; those used last stay longer, up to a limit of
bytes.

Not covered: images that look alike but differ in a byte.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from gc2ray.compression.geometry import NEWLINE
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.errors import BadRow
from gc2ray.core.records import RECIPES_POLICY
from gc2ray.models.image_processor import Tiles


@dataclass(eq=False)
class CachedImage:
    """An image and what the engine has made of it so far.

    Attributes:
        key: Digest of its bytes, and of the prompt where the method reads it.
        policy: Name of the policy that compresses it.
        kept_mask: Which tokens were kept, a bitmap for each view, in the order of `kept_per_view`.
        decoded: Set when there are `tiles` or a `failure`.
        tiles: Its views as bytes, until it is encoded.
        packed: Its visual tokens for the language model, (K, D).
        positions: Their positions in the uncompressed image, or None.
        failure: Why it cannot be used.
        is_retryable: Whether the failure may pass.
        oom_splits: How often a batch with it ran out of memory and was split in half.
        row_count: Rows with this image so far.
        kept_per_view: Visual tokens kept of each view: the thumbnail, None where there is none,
            then the crops.
        full_per_view: The same before compression.
        encoded_views: Views that went through the tower.
        kept_tokens: Visual tokens kept.
        full_tokens: Visual tokens before compression.
        newlines: Learned newlines that stay.
        full_newlines: Those before compression.
        markers: Literal tokens around views that stay; they count as text.
        full_markers: Those before compression.
        marker_ids: Their different token ids.
        shares: Retentions of all images of the row, where they share a budget.
    """

    key: str
    policy: str = RECIPES_POLICY
    kept_mask: tuple[bytes | None, ...] = ()
    decoded: threading.Event = field(default_factory=threading.Event)
    tiles: Tiles | None = None
    packed: Tensor | None = None
    positions: OriginalPositions | None = None
    failure: BadRow | None = None
    is_retryable: bool = False
    oom_splits: int = 0
    row_count: int = 0
    kept_per_view: tuple[int | None, ...] = ()
    full_per_view: tuple[int | None, ...] = ()
    encoded_views: int = 0
    kept_tokens: int = 0
    full_tokens: int = 0
    newlines: int = 0
    full_newlines: int = 0
    markers: int = 0
    full_markers: int = 0
    marker_ids: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def seed(self) -> int:
        """A seed that depends on the image only, never on its row, batch or worker."""
        return int(self.key[:14], 16)

    @property
    def share(self) -> float | None:
        """Its own retention, where the images of a row share a budget."""
        return self.shares[int(self.key.rpartition(".")[2])] if self.shares else None

    @property
    def packed_tokens(self) -> int:
        """Tokens that stand in the prompt in the image's place."""
        return self.kept_tokens + self.newlines + self.markers

    @property
    def full_length(self) -> int:
        """Those before compression."""
        return self.full_tokens + self.full_newlines + self.full_markers

    @property
    def views(self) -> int:
        """Views that are still to be encoded."""
        return 0 if self.tiles is None else len(self.tiles.pixels)

    def count(self, views: Views, selection: Selection) -> None:
        """Count the tokens that the compressor kept."""
        geometry = views.geometry
        selection = Selection(selection.entries.cpu())  # once
        kept = selection.kept_per_view(geometry)
        self.encoded_views, self.full_tokens = len(kept), geometry.visual_tokens
        self.kept_tokens = sum(kept)
        self.full_per_view = geometry.thumbnail_first(geometry.full_per_view)
        self.kept_per_view = geometry.thumbnail_first(kept)
        self.kept_mask = geometry.thumbnail_first(selection.bitmaps(geometry))
        self.newlines = int((selection.entries == NEWLINE).sum())
        self.full_newlines = geometry.newlines
        self.markers = len(selection.entries) - self.kept_tokens - self.newlines
        self.full_markers = geometry.literals
        self.marker_ids = geometry.literal_ids


def image_key(data: bytes, prompt: str | None = None, policy: str = RECIPES_POLICY) -> str:
    """Digest of an image's bytes, and of the prompt where the method reads it.

    Each policy that compresses the same image has a key of its own.
    """
    digest = hashlib.blake2b(data, digest_size=16)
    if prompt is not None:
        digest.update(hashlib.blake2b(prompt.encode(), digest_size=16).digest())
    return digest.hexdigest() + ("" if policy == RECIPES_POLICY else f"/{policy}")


def image_keys(
    row: Sequence[bytes],
    prompt: str | None = None,
    policy: str = RECIPES_POLICY,
    *,
    cuts_several_differently: bool,
    shares_budget: bool,
) -> list[str]:
    """Keys of a row's images; images of one key are encoded once.

    Args:
        row: The images' bytes.
        prompt: Where the method reads it.
        policy: What compresses them.
        cuts_several_differently: Whether the model cuts an image differently where its row has
            several; then it has another key than where it is alone.
        shares_budget: Whether the images of a row share a budget; then each key names all of them.
    """
    keys = [image_key(data, prompt, policy) for data in row]
    if len(row) == 1:
        return keys
    if shares_budget:
        images = hashlib.blake2b("/".join(keys).encode(), digest_size=8).hexdigest()
        return [f"{key}/{images}.{index}" for index, key in enumerate(keys)]
    return [f"{key}/several" for key in keys] if cuts_several_differently else keys


@dataclass(eq=False)
class ImageUnit:
    """Images that are compressed together: one, or those of a row that share a budget.

    Attributes:
        images: The images.
    """

    images: tuple[CachedImage, ...]

    @property
    def pending(self) -> list[CachedImage]:
        """Those that are still to be encoded."""
        return [image for image in self.images if image.tiles is not None]

    @property
    def failure(self) -> BadRow | None:
        """Why they cannot be used; setting it sets that of each image to be encoded."""
        return next((i.failure for i in self.images if i.failure is not None), None)

    @failure.setter
    def failure(self, failure: BadRow | None) -> None:
        for image in self.pending:
            image.failure = failure

    @property
    def is_retryable(self) -> bool:
        """Whether the failure may pass."""
        return any(image.is_retryable for image in self.images)

    @is_retryable.setter
    def is_retryable(self, is_retryable: bool) -> None:
        for image in self.pending:
            image.is_retryable = is_retryable

    @property
    def oom_splits(self) -> int:
        """How often a batch with them ran out of memory and was split in half."""
        return self.images[0].oom_splits

    @oom_splits.setter
    def oom_splits(self, splits: int) -> None:
        self.images[0].oom_splits = splits


class ImageCache:
    """The images in use, and those used last.

    Args:
        kept_bytes: Most bytes of packed tokens of images that are kept for later rows.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._images: WeakValueDictionary[str, CachedImage] = WeakValueDictionary()
        self._kept: OrderedDict[str, CachedImage] = OrderedDict()  # used longest ago first
        self._bytes = 0  # of those
        self._lock = threading.Lock()

    def find(
        self, key: str, policy: str = RECIPES_POLICY, *, again: bool = False
    ) -> tuple[CachedImage, bool]:
        """The image of a key, and whether it is new, so that the caller has to decode it.

        Args:
            key: See `image_keys`.
            policy: What compresses it.
            again: Whether the same row shows it once more: rows are counted, not places.
        """
        with self._lock:
            cached_image = self._images.get(key)
            new = cached_image is None
            if cached_image is None:
                cached_image = self._images[key] = CachedImage(key, policy)
            cached_image.row_count += not again
            if key in self._kept:
                self._kept.move_to_end(key)
            return cached_image, new

    def keep(self, cached_image: CachedImage) -> None:
        """Keep an encoded image for later rows, in place of those used longest ago."""
        with self._lock:
            self._drop(cached_image.key)
            self._kept[cached_image.key] = cached_image
            self._bytes += _bytes(cached_image)
            while self._bytes > self._kept_bytes:
                self._drop(next(iter(self._kept)))

    def discard(self, cached_image: CachedImage) -> None:
        """Let later rows try the image again: its failure may not be its own fault."""
        with self._lock:
            self._drop(cached_image.key)
            if self._images.get(cached_image.key) is cached_image:
                del self._images[cached_image.key]

    def _drop(self, key: str) -> None:
        cached_image = self._kept.pop(key, None)
        self._bytes -= 0 if cached_image is None else _bytes(cached_image)


def _bytes(cached_image: CachedImage) -> int:
    return 0 if cached_image.packed is None else cached_image.packed.nbytes

"""`PromptBuilder`: from a request to its prompt: read, decode, encode, compress, embed.

`open` runs on several threads, a row at a time; `encode` runs on one thread for a batch of opened
rows. On a GPU it has a stream of its own, so that it can run beside the decoder.

Rows with the same image share it: see `gc2ray.engine.image_cache`. Failures are recorded in the
rows.

Not covered: several images or prompts in one request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode, refusal
from gc2ray.engine.decoding.decoder import overflow
from gc2ray.engine.image_cache import CachedImage, ImageCache, image_key
from gc2ray.engine.request_state import RequestState, run_isolated, share_time
from gc2ray.models.adapter import ModelAdapter
from gc2ray.models.base import Prompt
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.image_processor import Cropping, Tiles, tile


class PromptBuilder:
    """Makes prompts from requests.

    Args:
        adapter: The model's vision side, projector and text table.
        chat: The model's chat template.
        recipe: Limits of images, seed and generation.
        policies: Compression policies by name.
        cached_image_bytes: Most bytes of packed images that are kept for later rows.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        chat: ChatPrompt,
        recipe: Recipe,
        policies: Mapping[str, CompressionPolicy],
        cached_image_bytes: int,
    ) -> None:
        self._adapter = adapter
        self._chat = chat
        self._policies = policies
        self._images = recipe.input.image_limits()
        self._generation = recipe.generation
        self._cached_image_bytes = cached_image_bytes
        self._image_cache = ImageCache(cached_image_bytes)
        self._stream: torch.cuda.Stream | None = None

    def clear_cache(self) -> None:
        """Drop the images that were kept for later rows."""
        self._image_cache = ImageCache(self._cached_image_bytes)

    def open(self, request: Request) -> RequestState:
        """Read the image, and decode and tile it unless another row did; called on threads."""

        def work(_: Sequence[RequestState]) -> None:
            if request.fault is not None:
                raise request.fault
            if len(request.images) != 1 or len(request.prompts) != 1:
                raise BadRow(Status.FAILED, "a request has one image and one prompt, for now")
            data = read_bytes(request.images[0], self._images)
            policy = request.policy
            reads_prompt = self._policies[policy].compressor.reads_prompt
            key = image_key(data, request.prompts[0] if reads_prompt else None, policy)
            row.cached_image, new = self._image_cache.find(key, policy)
            row.shares_image = not new
            if new:
                self._decode(row.cached_image, request, data)

        started = time.perf_counter_ns()
        row = RequestState(replace(request, images=()))  # encoded bytes are not needed any more
        run_isolated([row], work)
        row.stage_ns["image"] = time.perf_counter_ns() - started
        return row

    def _decode(self, cached_image: CachedImage, request: Request, data: bytes) -> None:
        def work(cached_images: Sequence[CachedImage]) -> None:
            ref = request.images[0]
            cached_images[0].tiles = tiles_of(
                data, ref, self._adapter.family.cropping, self._images
            )

        try:
            run_isolated([cached_image], work)
        finally:
            cached_image.decoded.set()

    @torch.inference_mode()
    def encode(self, rows: list[RequestState]) -> list[RequestState]:
        """Turn the rows of a batch from tiles into prompts; failures are recorded in them.

        Raises:
            EngineDead: The device is lost.
        """
        with torch.cuda.stream(self._own_stream()):  # nothing on a CPU
            payers: dict[CachedImage, RequestState] = {}
            for row in rows:
                if row.cached_image is not None:
                    row.cached_image.decoded.wait()
                    if row.cached_image.tiles is not None:
                        payers.setdefault(row.cached_image, row)
            run_isolated(list(payers), lambda cached_images: self._encode(cached_images, payers))
            for cached_image, row in payers.items():
                row.oom_splits += cached_image.oom_splits
            for row in rows:
                if row.cached_image is not None and row.cached_image.failure is not None:
                    self._image_cache.discard(row.cached_image)
                    row.failure, row.is_retryable = (
                        row.cached_image.failure,
                        row.cached_image.is_retryable,
                    )
            run_isolated([row for row in rows if row.failure is None], self._embed)
            self._now()  # the results are complete before another stream reads them
        return rows

    def _encode(
        self, cached_images: Sequence[CachedImage], payers: Mapping[CachedImage, RequestState]
    ) -> None:
        """Run tower, selection and projection; the rows that brought the images take the time."""
        tiles = [
            cached_image.tiles for cached_image in cached_images if cached_image.tiles is not None
        ]
        started = self._now()
        seeds = [self._generation.mixed(cached_image.seed) for cached_image in cached_images]
        views = self._adapter.encode(tiles, seeds)
        finite = torch.stack([view.scores.isfinite().all() for view in views]).all()
        encoded = self._now()
        if not finite:  # in some image of the batch; `run_isolated` finds out which
            raise overflow("the vision tower's scores of the image")
        selections, positions = self._select(cached_images, views)
        packed = self._adapter.pack(views, selections)
        compressed = self._now()
        rows = [payers[cached_image] for cached_image in cached_images]
        share_time(
            rows,
            "encode",
            encoded - started,
            [cached_image.views for cached_image in cached_images],
        )
        # Copies, because a view of the batch would keep all of it in memory. All of them are made
        # before any image counts as encoded: a batch that fails here is tried again in halves.
        copies = [part.clone() for part in packed]
        for index, cached_image in enumerate(cached_images):
            cached_image.count(views[index], selections[index])
            cached_image.packed, cached_image.positions = copies[index], positions[index]
            cached_image.tiles = None
            self._image_cache.keep(cached_image)
        full = [cached_image.full_tokens for cached_image in cached_images]
        share_time(rows, "compress", compressed - encoded, full)

    def _select(
        self, cached_images: Sequence[CachedImage], views: Sequence[Views]
    ) -> tuple[list[Selection], list[OriginalPositions | None]]:
        """Each image's kept tokens and their original positions, by the image's own policy."""
        selections: dict[int, Selection] = {}
        positions: dict[int, OriginalPositions | None] = {}
        for name in dict.fromkeys(cached_image.policy for cached_image in cached_images):
            policy = self._policies[name]
            own = [at for at, image in enumerate(cached_images) if image.policy == name]
            own_views = [views[at] for at in own]
            kept = policy.packing.apply(own_views, policy.compressor.many(own_views))
            selections |= dict(zip(own, kept, strict=True))
            positions |= dict(
                zip(own, policy.packing.original_positions(own_views, kept), strict=True)
            )
        order = range(len(cached_images))
        return [selections[at] for at in order], [positions[at] for at in order]

    def _embed(self, rows: Sequence[RequestState]) -> None:
        for row in rows:
            cached_image = row.cached_image
            if cached_image is None or cached_image.packed is None:
                raise RuntimeError(f"{row.request.row_key} has no image")
            row.token_ids = self._chat.encode(row.request.prompts[0])
            prompt = self._adapter.embed(
                row.token_ids, [cached_image.packed], [cached_image.positions]
            )
            row.failure = self._too_long(prompt)
            if row.failure is None:
                row.prompt = replace(
                    prompt,
                    prefix_key=_prefix_key(row, cached_image, prompt),
                    token_ids=tuple(row.token_ids),
                )

    def _too_long(self, prompt: Prompt) -> BadRow | None:
        new, limit = self._generation.max_new_tokens, self._adapter.max_positions
        positions = prompt.positions
        stop = len(prompt) if positions is None else int(positions.max()) + 1
        if stop + new <= limit:
            return None
        placed = "" if positions is None else f" at positions up to {stop - 1}"
        message = f"{len(prompt)} prompt tokens{placed} and {new} new ones"
        message += f"; the model reads at most {limit}"
        return BadRow(Status.TOO_LONG, message)

    def _own_stream(self) -> torch.cuda.Stream | None:
        """The stream that runs beside the decoder's; None on a CPU."""
        if self._adapter.device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._adapter.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _now(self) -> int:
        """The time in nanoseconds, once all work on this thread's stream is done."""
        if self._adapter.device.type == "cuda":
            torch.cuda.current_stream(self._adapter.device).synchronize()
        return time.perf_counter_ns()


def _prefix_key(row: RequestState, cached_image: CachedImage, prompt: Prompt) -> str | None:
    """Equal for prompts that begin with the same text and image; None where no row shares it."""
    if cached_image.row_count < 2:
        return None
    before = row.token_ids[: prompt.visual[0][0]]
    text = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    return f"{cached_image.key}/{text}"


def load_tiles(ref: ImageRef, cropping: Cropping, policy: ImageLimits) -> Tiles:
    """Read, decode and tile one image.

    Raises:
        BadRow: `BAD_IMAGE`, see `read_bytes` and `decode`.
        ConfigError, ShardError: See `read_bytes`.
    """
    return tiles_of(read_bytes(ref, policy), ref, cropping, policy)


def tiles_of(data: bytes, ref: ImageRef, cropping: Cropping, policy: ImageLimits) -> Tiles:
    """Decode and tile the bytes of an image.

    Raises:
        BadRow: `BAD_IMAGE`, see `decode`.
    """
    try:
        image = decode(data, policy)
    except BadRow as error:
        if ref.data is not None or ref.path is None:
            raise
        raise refusal(error.message, ref.path) from error
    return tile(image, cropping)

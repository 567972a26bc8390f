"""`PromptBuilder`: from a request to its prompt: read, decode, encode, compress, embed.

`open` runs on several threads, a row at a time; `encode` runs on one thread for a batch of opened
rows. On a GPU it has a stream of its own, so that it can run beside the decoder.

Rows with the same image share it: see `gc2ray.engine.image_cache`. A row may have several images,
or none. Failures are recorded in the rows.

Not covered: several prompts in one request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby

import torch

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.registry import COMPRESSORS
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode, refusal
from gc2ray.engine.decoding.decoder import overflow
from gc2ray.engine.image_cache import CachedImage, ImageCache, ImageUnit, image_keys
from gc2ray.engine.request_state import RequestState, run_isolated, share_time
from gc2ray.models.adapter import ModelAdapter
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
        """Read the images, and decode and tile those that no other row did; called on threads."""

        def work(_: Sequence[RequestState]) -> None:
            if request.fault is not None:
                raise request.fault
            if len(request.prompts) != 1:
                raise BadRow(Status.FAILED, "a request has one prompt, for now")
            # All are read before any is entered, as others may wait for what is entered.
            read = self._read(request)
            seen: set[str] = set()
            for ref, data, key in zip(request.images, read, self._keys(request, read), strict=True):
                again = key in seen
                cached_image, new = self._image_cache.find(key, request.policy, again=again)
                seen.add(key)
                row.cached_images.append(cached_image)
                row.encoded.append(False)
                if new:
                    self._decode(cached_image, ref, data, alone=len(request.images) == 1)

        started = time.perf_counter_ns()
        row = RequestState(replace(request, images=()))  # encoded bytes are not needed any more
        run_isolated([row], work)
        row.stage_ns["image"] = time.perf_counter_ns() - started
        return row

    def _read(self, request: Request) -> list[bytes]:
        """The bytes of a request's images.

        Raises:
            BadRow: One cannot be read; the message says which.
        """
        read = []
        for index, ref in enumerate(request.images):
            try:
                read.append(read_bytes(ref, self._images))
            except BadRow as error:
                raise _of_several(error, index, len(request.images)) from error
        return read

    def _keys(self, request: Request, read: Sequence[bytes]) -> list[str]:
        """Keys of a request's images."""
        policy = self._policies[request.policy]
        return image_keys(
            read,
            request.prompts[0] if policy.compressor.reads_prompt else None,
            request.policy,
            cuts_several_differently=self._adapter.family.cropping.cuts_several_differently,
            shares_budget=policy.shares_budget,
        )

    def _decode(
        self, cached_image: CachedImage, ref: ImageRef, data: bytes, *, alone: bool
    ) -> None:
        def work(cached_images: Sequence[CachedImage]) -> None:
            cropping = self._adapter.family.cropping
            cached_images[0].tiles = tiles_of(data, ref, cropping, self._images, alone=alone)

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
            for row in rows:
                for cached_image in row.cached_images:
                    cached_image.decoded.wait()
                self._take_failures(row)
            run_isolated([row for row in rows if row.failure is None], self._tokenise)
            readable = [row for row in rows if row.failure is None]
            payers = _payers(readable)
            run_isolated(self._units(readable), lambda units: self._encode(units, payers))
            for cached_image, row in payers.items():
                row.oom_splits += cached_image.oom_splits
            for row in readable:
                self._take_failures(row)
            run_isolated([row for row in rows if row.failure is None], self._embed)
            self._now()  # the results are complete before another stream reads them
        return rows

    def _tokenise(self, rows: Sequence[RequestState]) -> None:
        """Token ids of prompts; what is too long whatever is kept fails before encoding."""
        for row in rows:
            images, policy = row.cached_images, self._policies[row.request.policy]
            row.token_ids = self._chat.encode(row.request.prompts[0], len(images))
            least = len(row.token_ids) - len(images)
            if not policy.shares_budget:
                least += sum(self._least_tokens(image, policy) for image in images)
            row.failure = self._too_long(least, f"at least {least} prompt tokens")

    def _least_tokens(self, image: CachedImage, policy: CompressionPolicy) -> int:
        if image.tiles is None:
            return image.packed_tokens
        if type(policy.compressor) not in COMPRESSORS.values():
            return 0  # one of the user's own need not keep what it says
        geometry = self._adapter.family.geometry(image.tiles.size, alone=image.tiles.alone)
        return policy.compressor.bounds(geometry)[0]

    def _units(self, rows: Sequence[RequestState]) -> list[ImageUnit]:
        """The images of rows that are still to be encoded, each once, with those they belong to."""
        units: dict[CachedImage, ImageUnit] = {}
        for row in rows:
            shares = self._policies[row.request.policy].shares_budget
            images = tuple(row.cached_images)
            for unit in [images] if shares and len(images) > 1 else [(i,) for i in images]:
                if unit[0] not in units and any(image.tiles is not None for image in unit):
                    units[unit[0]] = ImageUnit(unit)
        return list(units.values())

    def _take_failures(self, row: RequestState) -> None:
        """Fail a row whose image failed; its message says which, where that is known."""
        failed = [image for image in row.cached_images if image.failure is not None]
        together = len(set(failed)) > 1 and len({id(image.failure) for image in failed}) == 1
        for cached_image in failed:
            self._image_cache.discard(cached_image)
            if row.failure is None and cached_image.failure is not None:
                index, count = row.cached_images.index(cached_image), len(row.cached_images)
                row.failure = _of_several(cached_image.failure, index, 1 if together else count)
            row.is_retryable |= cached_image.is_retryable

    def _encode(
        self, units: Sequence[ImageUnit], payers: Mapping[CachedImage, RequestState]
    ) -> None:
        """Run tower, selection and projection; the rows that pay for the images take the time."""
        cached_images = [image for unit in units for image in unit.pending]
        tiles = [
            cached_image.tiles for cached_image in cached_images if cached_image.tiles is not None
        ]
        started = self._now()
        seeds = [self._generation.mixed(cached_image.seed) for cached_image in cached_images]
        views = self._views(units, tiles, seeds)
        finite = torch.stack([view.scores.isfinite().all() for view in views]).all()
        encoded = self._now()
        if not finite:  # in some image of the batch; `run_isolated` finds out which
            raise overflow("the vision tower's scores of the image")
        self._share_budgets(units, dict(zip(cached_images, views, strict=True)))
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

    def _views(
        self, units: Sequence[ImageUnit], tiles: Sequence[Tiles], seeds: Sequence[int]
    ) -> list[Views]:
        """What the tower makes of images.

        Those of a single row go through it in groups of about as many views as it takes at once;
        where the device has not enough memory for that, one after the other, so that a row of many
        images that share a budget needs no more there than one image does.
        """
        if len(units) > 1 or len(tiles) == 1:
            return self._adapter.encode(tiles, seeds)
        try:
            return self._grouped_views(tiles, seeds, self._adapter.tower_views)
        except torch.OutOfMemoryError:
            units[0].pending[0].oom_splits += 1
        torch.cuda.empty_cache()
        return self._grouped_views(tiles, seeds, 1)

    def _grouped_views(
        self, tiles: Sequence[Tiles], seeds: Sequence[int], views: int
    ) -> list[Views]:
        """What the tower makes of images in groups; one begins at every multiple of `views`."""
        before = accumulate((len(image.pixels) for image in tiles[:-1]), initial=0)
        found: list[Views] = []
        for _, group in groupby(
            zip(before, tiles, seeds, strict=True), lambda image: image[0] // views
        ):
            _, some, their_seeds = zip(*group, strict=True)
            found += self._adapter.encode(some, their_seeds)
        return found

    def _share_budgets(
        self, units: Sequence[ImageUnit], views: Mapping[CachedImage, Views]
    ) -> None:
        """Set the retentions of images that share a budget.

        Of a unit that another row had encoded, and that lost an image since, they are known.
        """
        for unit in units:
            policy = self._policies[unit.images[0].policy]
            known = next((image.shares for image in unit.images if image.shares), None)
            if known is None and all(image in views for image in unit.images):
                known = tuple(policy.shares_of([views[image] for image in unit.images]) or ())
            for image in unit.images:
                image.shares = known or ()

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
            kept = policy.select(own_views, [cached_images[at].share for at in own])
            selections |= dict(zip(own, kept, strict=True))
            positions |= dict(
                zip(own, policy.packing.original_positions(own_views, kept), strict=True)
            )
        order = range(len(cached_images))
        return [selections[at] for at in order], [positions[at] for at in order]

    def _embed(self, rows: Sequence[RequestState]) -> None:
        for row in rows:
            packed = [image.packed for image in row.cached_images if image.packed is not None]
            if len(packed) != len(row.cached_images):
                raise RuntimeError(f"{row.request.row_key} lacks an image")
            positions = [image.positions for image in row.cached_images]
            prompt = self._adapter.embed(row.token_ids, packed, positions)
            stop = len(prompt) if prompt.positions is None else int(prompt.positions.max()) + 1
            placed = "" if stop == len(prompt) else f" at positions up to {stop - 1}"
            row.failure = self._too_long(stop, f"{len(prompt)} prompt tokens{placed}")
            if row.failure is None:
                key, images = _prefix(row, self._adapter.family.image_token_id)
                row.prefix_images = images
                row.prompt = replace(
                    prompt,
                    prefix_key=key,
                    prefix_images=images,
                    token_ids=tuple(row.token_ids),
                    marker_ids=tuple({i for image in row.cached_images for i in image.marker_ids}),
                )

    def _too_long(self, stop: int, length: str) -> BadRow | None:
        """The failure of a prompt that leaves no room for an answer from position `stop` on."""
        new, limit = self._generation.max_new_tokens, self._adapter.max_positions
        if stop + new <= limit:
            return None
        message = f"{length} and {new} new ones; the model reads at most {limit}"
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


def _payers(rows: Sequence[RequestState]) -> dict[CachedImage, RequestState]:
    """The first row of each image that is still to be encoded; it is counted there."""
    payers: dict[CachedImage, RequestState] = {}
    for row in rows:
        for index, cached_image in enumerate(row.cached_images):
            if cached_image.tiles is not None and cached_image not in payers:
                payers[cached_image], row.encoded[index] = row, True
    return payers


def _prefix(row: RequestState, placeholder: int) -> tuple[str | None, int]:
    """The key of a prompt's beginning, and the images in it; None and 0 where no row shares any.

    It is equal for prompts that begin with the same text and images. The beginning ends behind the
    last of the first images that other rows show, too.
    """
    shared = 0
    for cached_image in row.cached_images:
        if cached_image.row_count < 2:
            break
        shared += 1
    if not shared:
        return None, 0
    marks = [place for place, token in enumerate(row.token_ids) if token == placeholder]
    before = row.token_ids[: marks[shared - 1]]
    text = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    keys = "/".join(image.key for image in row.cached_images[:shared])
    return f"{keys}/{text}", shared


def _of_several(failure: BadRow, index: int, count: int) -> BadRow:
    """A failure of one of a row's images, which its message names where there are several."""
    if count == 1:
        return failure
    return BadRow(failure.status, f"image {index + 1} of {count}: {failure.message}")


def load_tiles(ref: ImageRef, cropping: Cropping, policy: ImageLimits) -> Tiles:
    """Read, decode and tile one image.

    Raises:
        BadRow: `BAD_IMAGE`, see `read_bytes` and `decode`.
        ConfigError, ShardError: See `read_bytes`.
    """
    return tiles_of(read_bytes(ref, policy), ref, cropping, policy)


def tiles_of(
    data: bytes, ref: ImageRef, cropping: Cropping, policy: ImageLimits, *, alone: bool = True
) -> Tiles:
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
    return tile(image, cropping, alone=alone)

"""`Vision`: an engine's way from a request to a prompt: read, decode, encode, compress, embed.

`open` runs on threads, a row at a time; `encode` takes a batch of what they made, on one thread. On
a GPU it runs on a stream of its own, so that it may go on beside the decoder.

Rows that show the same image share it: see `gc2ray.engine.image_cache`. Trouble is noted in the
rows.

Not covered: several images or prompts in one request.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gc2ray.compression.policy import Way
from gc2ray.compression.selection import Places, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.input import (
    ImagePolicy,
)
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import (
    decode,
    refusal,
)
from gc2ray.engine.image_cache import Picture, Pictures, picture_key
from gc2ray.engine.request_state import Row, attempt, share_time
from gc2ray.models.base import Family, Prompt
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.image_processor import AnyRes, Tiles, tile


class Vision:
    """Makes prompts of requests.

    Args:
        family: The model's vision side, projector and text table.
        chat: Its chat template.
        recipe: What to compute.
        ways: How images may be compressed, by name.
        remembered_bytes: Packed pictures that are kept for rows to come, at most.
    """

    def __init__(
        self,
        family: Family,
        chat: ChatPrompt,
        recipe: Recipe,
        ways: Mapping[str, Way],
        remembered_bytes: int,
    ) -> None:
        self._family = family
        self._chat = chat
        self._ways = ways
        self._images = recipe.input.image_policy()
        self._generation = recipe.generation
        self._remembered_bytes = remembered_bytes
        self._pictures = Pictures(remembered_bytes)
        self._stream: torch.cuda.Stream | None = None

    def forget(self) -> None:
        """Drop the pictures that were kept for rows to come."""
        self._pictures = Pictures(self._remembered_bytes)

    def open(self, request: Request) -> Row:
        """Read the image, and decode and tile it unless another row does; runs on threads."""

        def work(_: Sequence[Row]) -> None:
            if request.fault is not None:
                raise request.fault
            if len(request.images) != 1 or len(request.prompts) != 1:
                raise BadRow(Status.FAILED, "a request has one image and one prompt, for now")
            data = read_bytes(request.images[0], self._images)
            way = request.way
            reads_prompt = self._ways[way].compressor.reads_prompt
            key = picture_key(data, request.prompts[0] if reads_prompt else None, way)
            row.picture, new = self._pictures.find(key, way)
            row.shares = not new
            if new:
                self._decode(row.picture, request, data)

        started = time.perf_counter_ns()
        row = Row(replace(request, images=()))  # encoded bytes are not needed any more
        attempt([row], work)
        row.stage_ns["image"] = time.perf_counter_ns() - started
        return row

    def _decode(self, picture: Picture, request: Request, data: bytes) -> None:
        def work(pictures: Sequence[Picture]) -> None:
            ref = request.images[0]
            pictures[0].tiles = tiles_of(data, ref, self._family.anyres, self._images)

        try:
            attempt([picture], work)
        finally:
            picture.decoded.set()

    @torch.inference_mode()
    def encode(self, rows: list[Row]) -> list[Row]:
        """From tiles to prompts, all rows of a batch; trouble is noted in them.

        Raises:
            EngineDead: The device is lost.
        """
        with torch.cuda.stream(self._own_stream()):  # nothing on a CPU
            payers: dict[Picture, Row] = {}
            for row in rows:
                if row.picture is not None:
                    row.picture.decoded.wait()
                    if row.picture.tiles is not None:
                        payers.setdefault(row.picture, row)
            attempt(list(payers), lambda pictures: self._encode(pictures, payers))
            for picture, row in payers.items():
                row.halvings += picture.halvings
            for row in rows:
                if row.picture is not None and row.picture.trouble is not None:
                    self._pictures.forget(row.picture)
                    row.trouble, row.retry = row.picture.trouble, row.picture.retry
            attempt([row for row in rows if row.trouble is None], self._embed)
            self._now()  # what was made is complete for whoever takes it
        return rows

    def _encode(self, pictures: Sequence[Picture], payers: Mapping[Picture, Row]) -> None:
        """Tower, selection, projection; time is put on the rows that brought the pictures."""
        tiles = [picture.tiles for picture in pictures if picture.tiles is not None]
        started = self._now()
        seeds = [self._generation.mixed(picture.seed) for picture in pictures]
        views = self._family.encode(tiles, seeds)
        finite = torch.stack([view.scores.isfinite().all() for view in views]).all()
        encoded = self._now()
        if not finite:  # of a batch; `attempt` finds out whose
            raise _scores_not_finite()
        selections, places = self._selected(pictures, views)
        packed = self._family.pack(views, selections)
        compressed = self._now()
        rows = [payers[picture] for picture in pictures]
        share_time(rows, "encode", encoded - started, [picture.views for picture in pictures])
        # Copies of their own: a part of the batch would keep all of it in memory. All are made
        # before any picture counts as encoded: a batch that fails here is tried again in halves.
        copies = [part.clone() for part in packed]
        for index, picture in enumerate(pictures):
            picture.count(views[index], selections[index])
            picture.packed, picture.places = copies[index], places[index]
            picture.tiles = None
            self._pictures.keep(picture)
        full = [picture.full_tokens for picture in pictures]
        share_time(rows, "compress", compressed - encoded, full)

    def _selected(
        self, pictures: Sequence[Picture], views: Sequence[Views]
    ) -> tuple[list[Selection], list[Places | None]]:
        """What is kept of each, and where it stood; each in its own way."""
        selections: dict[int, Selection] = {}
        places: dict[int, Places | None] = {}
        for name in dict.fromkeys(picture.way for picture in pictures):
            way = self._ways[name]
            chosen = [at for at, picture in enumerate(pictures) if picture.way == name]
            some = [views[at] for at in chosen]
            found = way.packing.apply(some, way.compressor.many(some))
            selections |= dict(zip(chosen, found, strict=True))
            places |= dict(zip(chosen, way.packing.places(some, found), strict=True))
        order = range(len(pictures))
        return [selections[at] for at in order], [places[at] for at in order]

    def _embed(self, rows: Sequence[Row]) -> None:
        for row in rows:
            picture = row.picture
            if picture is None or picture.packed is None:
                raise RuntimeError(f"{row.request.row_key} has no picture")
            row.token_ids = self._chat.encode(row.request.prompts[0])
            prompt = self._family.embed(row.token_ids, [picture.packed], [picture.places])
            row.trouble = self._too_long(prompt)
            if row.trouble is None:
                row.prompt = replace(
                    prompt,
                    prefix_key=_prefix_key(row, picture, prompt),
                    token_ids=tuple(row.token_ids),
                )

    def _too_long(self, prompt: Prompt) -> BadRow | None:
        new, limit = self._generation.max_new_tokens, self._family.max_positions
        positions = prompt.positions
        stop = len(prompt) if positions is None else int(positions.max()) + 1
        if stop + new <= limit:
            return None
        placed = "" if positions is None else f" at positions up to {stop - 1}"
        counts = f"{len(prompt)} prompt tokens{placed} and {new} new ones"
        counts += f"; the model reads at most {limit}"
        return BadRow(Status.TOO_LONG, counts)

    def _own_stream(self) -> torch.cuda.Stream | None:
        """Where this side runs, beside the decoder; None on a CPU."""
        if self._family.device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._family.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _now(self) -> int:
        """Nanoseconds, once this thread's stream has done what it was asked to."""
        if self._family.device.type == "cuda":
            torch.cuda.current_stream(self._family.device).synchronize()
        return time.perf_counter_ns()


def _scores_not_finite() -> BadRow:
    """What no method of compression can choose by: it would keep just any tokens."""
    return BadRow(
        Status.FAILED,
        "the vision tower's scores of the image are not finite (NaN or infinite): in float16 that "
        "is an overflow (set recipe.model.dtype to bfloat16 or float32), else the weights are "
        "damaged",
    )


def _prefix_key(row: Row, picture: Picture, prompt: Prompt) -> str | None:
    """The same for prompts that begin with the same text and picture; None where nobody shares."""
    if picture.rows < 2:
        return None
    before = row.token_ids[: prompt.visual[0][0]]
    text = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    return f"{picture.key}/{text}"


def load_tiles(ref: ImageRef, anyres: AnyRes, policy: ImagePolicy) -> Tiles:
    """Read, decode and tile one image.

    Raises:
        BadRow: `BAD_IMAGE`, see `read_bytes` and `decode`.
        ConfigError, ShardError: See `read_bytes`.
    """
    return tiles_of(read_bytes(ref, policy), ref, anyres, policy)


def tiles_of(data: bytes, ref: ImageRef, anyres: AnyRes, policy: ImagePolicy) -> Tiles:
    """Decode and tile what was read of an image.

    Raises:
        BadRow: `BAD_IMAGE`, see `decode`.
    """
    try:
        image = decode(data, policy)
    except BadRow as error:
        if ref.data is not None or ref.path is None:
            raise
        raise refusal(error.message, ref.path) from error
    return tile(image, anyres)

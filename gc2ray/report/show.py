"""Rows of an output, looked at again: what the recipe's method kept of their images.

The image is read from the input, and goes through the model's vision side and the recipe's method
once more, which gives what it gave when the row was answered: the choice depends on the image and
the recipe alone. The answer, and what an audit said, come from the output.

Not covered: methods that read the prompt; outputs whose input has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, ConfigError, ShardError, Status
from gc2ray.core.records import Request
from gc2ray.core.shards import Shards, Span
from gc2ray.data.dataset import Source
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode
from gc2ray.engine.engine import load_model
from gc2ray.engine.image_cache import CachedImage, image_key
from gc2ray.models.base import LoadedModel
from gc2ray.models.image_processor import tile
from gc2ray.output.latest import MERGED_BY, Latest
from gc2ray.output.parts import planned_parts
from gc2ray.output.run_directory import (
    RETRY_ROUNDS,
    RetryRound,
    open_first_round,
    open_round,
    retry_numbers,
)
from gc2ray.report.heat_map import TokenMap

HOST_BYTES = 64 << 20
COLUMNS = (*MERGED_BY, "row_key", "answer", "error", "retention_requested", "audit")


@dataclass(frozen=True)
class RowLocation:
    """Where a row is: its source, as it was when planned, and its number there."""

    source: str
    fingerprint: str
    row: int


def map_tokens(output: str, keys: Sequence[str]) -> Iterator[TokenMap]:
    """What was kept for some rows, one by one, by a model that is loaded once.

    Args:
        output: Directory or URL.
        keys: The rows' `row_key`.

    Raises:
        ConfigError: There is no such run or row, or an image cannot be read.
    """
    first = open_first_round(output)
    recipe = first.run.recipe
    places = [_place(first, key) for key in keys]
    requests = [_request(recipe, place, key) for place, key in zip(places, keys, strict=True)]
    latest, loaded = _latest(output, first), load_model(recipe, Cluster())
    for place, request in zip(places, requests, strict=True):
        answer = _answer(latest, first.plan.shards, place, request.row_key)
        captions = [f"{request.row_key}: {request.prompts[0]}", *told_of(answer)]
        yield _looked(loaded, recipe, request, captions)


def _place(retry_round: RetryRound, key: str) -> RowLocation:
    """A source may have any name, so its row, and its prompt, are what stands behind it."""
    fingerprints = dict(retry_round.plan.shards.files)
    for parts in (key.rsplit("#", 1), key.rsplit("#", 2)[:2]):
        source, row = parts[0], parts[-1]
        if source in fingerprints and row.isdigit():
            return RowLocation(source, fingerprints[source], int(row))
    raise ConfigError(f"no row {key!r} in the plan; the column row_key has those that there are")


def _request(recipe: Recipe, place: RowLocation, key: str) -> Request:
    span = Span(place.source, place.fingerprint, place.row, place.row + 1)
    try:
        found = [r for r in Source(recipe.input).read(span, HOST_BYTES) if r.row_key == key]
    except ShardError as error:
        raise ConfigError(f"{key}: {error}") from error
    if not found:
        raise ConfigError(f"{key}: the row has no such prompt")
    if found[0].fault is not None:
        raise ConfigError(f"{key}: {found[0].fault.message}")
    return found[0]


@torch.inference_mode()
def _looked(loaded: LoadedModel, recipe: Recipe, request: Request, captions: list[str]) -> TokenMap:
    family, policy = loaded.family, recipe.input.image_policy()
    compressor = CompressionPolicy.from_config(recipe.compression).compressor
    try:
        data = read_bytes(request.images[0], policy)
        image = decode(data, policy)
    except (BadRow, ShardError) as error:
        raise ConfigError(f"{request.row_key}: {error}") from error
    seed = recipe.generation.mixed(CachedImage(image_key(data)).seed)
    (views,) = family.encode([tile(image, family.anyres)], [seed])
    selection = compressor(views)
    count, tokens = len(views.valid_per_view), views.tokens_per_view
    bits = [np.frombuffer(view, np.uint8) for view in selection.bitmaps(count, tokens)]
    kept = np.unpackbits(np.stack(bits), axis=1, count=tokens, bitorder="little").astype(bool)
    compression = recipe.compression
    method = f"{compression.method}, retention {compression.retention_requested:g}"
    full = sum(views.valid_per_view)
    told = f"{method}: {int(kept.sum())} of {full} visual tokens kept"
    return TokenMap(
        image=np.asarray(image),
        canvas=views.canvas,
        scores=views.scores[0].float().cpu().numpy(),
        kept=kept,
        captions=[*captions, told],
    )


def _latest(output: str, first: RetryRound) -> Latest:
    """The latest answers of an output, by what is committed now."""
    numbers = retry_numbers(first.store.names(RETRY_ROUNDS))
    retries = (open_round(output, number) for number in numbers)
    found = [first, *(retry for retry in retries if retry is not None)]
    return Latest([(each, planned_parts(each.store, each.plan.shards).committed) for each in found])


def _answer(latest: Latest, shards: Shards, place: RowLocation, key: str) -> dict[str, Any] | None:
    """The latest answer to a row; None where it has none yet."""
    file, spans = shards.files.index((place.source, place.fingerprint)), shards.spans
    holding = (spans.file == file) & (spans.first <= place.row) & (place.row < spans.stop)
    for index in spans.shard[holding]:
        answers = latest.answers(int(index), COLUMNS)
        if answers is not None:
            return next(iter(answers.filter(pc.equal(answers["row_key"], key)).to_pylist()), None)
    return None


def told_of(answer: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines about an answer row, or none yet: what was said, anew, and uncompressed."""
    if answer is None:
        yield "not answered yet"
        return
    said = answer["answer"]
    if answer["status"] != Status.OK:
        said = f"none ({answer['status']}: {answer['error']})"
    audit = answer["audit"] or {}
    anew = audit.get("final_agreement")
    if anew is not None:
        yield f"answer: {_said(audit['first_answer'])}{_alike(audit['agreement'])}"
        yield f"anew at retention {answer['retention_requested']:g}: {said}{_alike(anew)}"
    else:
        yield f"answer: {said}{_alike(audit.get('agreement'))}"
    if audit:
        yield f"uncompressed: {_said(audit['answer'])}"


def _said(answer: str | None) -> str:
    return "none" if answer is None else answer


def _alike(agreement: float | None) -> str:
    """How far an answer agrees with the uncompressed one."""
    return "" if agreement is None else f" (agreement {agreement:.3f})"


def picture_name(output: str, key: str) -> str:
    """A file name for a row's picture."""
    last = output.rstrip("/").split("/")[-1]
    return f"{last}-{''.join(c if c.isalnum() or c in '.-_' else '_' for c in key)}.png"

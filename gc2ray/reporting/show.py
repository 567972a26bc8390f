"""Token maps of answered rows: which tokens the recipe's method kept of their images.

The images are read from the input again and go through the vision tower and the recipe's method.
The result is the one of the run, because the choice depends on the image and the recipe alone. The
answer and the audit come from the output.

Not covered: methods that read the prompt; outputs whose input has changed since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, ConfigError, ShardError, Status
from gc2ray.core.records import ImageRef, Request
from gc2ray.core.shards import Integers, Shards, Span
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode
from gc2ray.data.source import Source
from gc2ray.engine.engine import load_recipe_model
from gc2ray.engine.image_cache import CachedImage, image_key
from gc2ray.engine.sample import read_requests
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.image_processor import tile
from gc2ray.output.latest import MERGED_BY, Latest
from gc2ray.output.parts import planned_parts
from gc2ray.output.run_directory import (
    RETRY_ROUNDS,
    Round,
    open_first_round,
    open_round,
    retry_numbers,
)
from gc2ray.reporting.heat_map import TokenMap

COLUMNS = (*MERGED_BY, "row_key", "answer", "error", "retention_requested", "audit")

MAX_DIGITS = 18
"""Of the number of a row, which fits 64 bits."""


@dataclass(frozen=True)
class RowLocation:
    """Location of a row: its source with the fingerprint in the plan, and its number there."""

    source: str
    fingerprint: str
    row: int


def map_tokens(output: str, keys: Sequence[str]) -> Iterator[list[TokenMap]]:
    """Token maps of some rows, one for each image, row by row; the model is loaded once.

    Args:
        output: Directory or URL.
        keys: The rows' `row_key`.

    Raises:
        ConfigError: There is no such run or row, it has no image, or an image cannot be read.
    """
    first = open_first_round(output)
    recipe = first.run.recipe
    locations = [_location(first, key) for key in keys]
    requests = [_request(recipe, *pair) for pair in zip(locations, keys, strict=True)]
    latest, loaded = _latest(output, first), load_recipe_model(recipe, Cluster())
    for location, request in zip(locations, requests, strict=True):
        answer = _answer(latest, first.plan.shards, location, request.row_key)
        captions = [f"{request.row_key}: {request.prompts[0]}", *answer_lines(answer)]
        yield _token_maps(loaded, _as_answered(recipe, answer), request, captions)


def _location(this_round: Round, key: str) -> RowLocation:
    """Split a key from its end: a source's name may contain `#` itself."""
    fingerprints = dict(this_round.plan.shards.files)
    for parts in (key.rsplit("#", 1), key.rsplit("#", 2)[:2]):
        source, row = parts[0], parts[-1]
        if source in fingerprints and row.isdecimal() and len(row) <= MAX_DIGITS:
            location = RowLocation(source, fingerprints[source], int(row))
            if _shards_of(location, this_round.plan.shards).size:
                return location
    raise ConfigError(f"no row {key!r} in the plan; the column row_key lists the keys")


def _request(recipe: Recipe, location: RowLocation, key: str) -> Request:
    span = Span(location.source, location.fingerprint, location.row, location.row + 1)
    requests = [r for r in read_requests(Source(recipe.input), [span]) if r.row_key == key]
    if not requests:
        raise ConfigError(
            f"{key}: the row has no such prompt; the column row_key lists the keys, which end in "
            "the prompt's number where prompts are lists"
        )
    if requests[0].fault is not None:
        raise ConfigError(f"{key}: {requests[0].fault.message}")
    if not requests[0].images:
        raise ConfigError(f"{key}: the row has no image")
    return requests[0]


def _shards_of(location: RowLocation, shards: Shards) -> Integers:
    """Indices of the shards that hold a row: one, or none where the file is shorter."""
    file, spans = shards.files.index((location.source, location.fingerprint)), shards.spans
    holding = (spans.file == file) & (spans.first <= location.row) & (location.row < spans.stop)
    holders: Integers = spans.shard[holding]
    return holders


def _as_answered(recipe: Recipe, answer: Mapping[str, Any] | None) -> Recipe:
    """The recipe at the retention of an answer, which an audit may have raised."""
    if answer is None or not recipe.compression.kind.takes_retention:
        return recipe
    retention = {"retention": answer["retention_requested"]}
    return recipe.model_copy(
        update={"compression": recipe.compression.model_copy(update=retention)}
    )


@torch.inference_mode()
def _token_maps(
    loaded: LoadedModel, recipe: Recipe, request: Request, captions: Sequence[str]
) -> list[TokenMap]:
    """The maps of a row's images; the first has the captions about the row."""
    count, policy = len(request.images), CompressionPolicy.from_config(recipe.compression)
    names = [f"image {index} of {count}: " if count > 1 else "" for index in range(1, count + 1)]
    encoded = []
    for name, ref in zip(names, request.images, strict=True):
        try:
            encoded.append(_encoded(loaded, recipe, ref, alone=count == 1))
        except (BadRow, ShardError) as error:
            raise ConfigError(f"{request.row_key}: {name}{error}") from error
    views = [view for _, view in encoded]
    shares: Sequence[float | None] = policy.shares_of(views) or [None] * count
    selections = policy.select(views, shares)
    maps = []
    for index, (image, view) in enumerate(encoded):
        kept = _token_map(image, view, selections[index])
        share = shares[index]
        setting = f"retention {recipe.compression.retention_requested:.3g}"
        if share is not None:
            setting += f", of which this image's share is {share:.3g}"
        line = f"{names[index]}{recipe.compression.method}, {setting}: "
        line += f"{int(kept.kept.sum())} of {view.geometry.visual_tokens} visual tokens kept"
        maps.append(replace(kept, captions=[*(captions if index == 0 else ()), line]))
    return maps


def _encoded(
    loaded: LoadedModel, recipe: Recipe, ref: ImageRef, *, alone: bool
) -> tuple[np.ndarray, Views]:
    """An image, and what the vision tower makes of it."""
    adapter, limits = loaded.adapter, recipe.input.image_limits()
    data = read_bytes(ref, limits)
    image = decode(data, limits)
    seed = recipe.generation.mixed(CachedImage(image_key(data)).seed)
    (views,) = adapter.encode([tile(image, adapter.family.cropping, alone=alone)], [seed])
    return np.asarray(image), views


def _token_map(image: np.ndarray, views: Views, selection: Selection) -> TokenMap:
    geometry, entries = views.geometry, selection.entries.cpu().numpy()
    kept = np.zeros(geometry.tokens, dtype=bool)
    kept[entries[entries >= 0]] = True
    commander = views.per_view(views.scores)[geometry.thumbnail or 0]
    return TokenMap(
        image=image,
        geometry=geometry,
        scores=commander.float().cpu().numpy(),
        kept=kept,
        captions=[],
    )


def _latest(output: str, first: Round) -> Latest:
    """The latest committed answers of an output."""
    numbers = retry_numbers(first.store.names(RETRY_ROUNDS))
    retries = (open_round(output, number) for number in numbers)
    rounds = [first, *(retry for retry in retries if retry is not None)]
    return Latest(
        [(each, planned_parts(each.store, each.plan.shards).committed) for each in rounds]
    )


def _answer(
    latest: Latest, shards: Shards, location: RowLocation, key: str
) -> dict[str, Any] | None:
    """The latest answer to a row; None where it has none yet."""
    for index in _shards_of(location, shards):
        answers = latest.answers(int(index), COLUMNS)
        if answers is not None:
            return next(iter(answers.filter(pc.equal(answers["row_key"], key)).to_pylist()), None)
    return None


def answer_lines(answer: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines about an answer row: the answer, the one after escalation, the uncompressed one."""
    if answer is None:
        yield "not answered yet"
        return
    text = answer["answer"]
    if answer["status"] != Status.OK:
        text = f"none ({answer['status']}: {answer['error']})"
    audit = answer["audit"] or {}
    final_similarity = audit.get("final_similarity")
    if final_similarity is not None:
        yield f"answer: {_text(audit['first_answer'])}{_similarity(audit['similarity'])}"
        retention = f"{answer['retention_requested']:g}"
        yield f"again at retention {retention}: {text}{_similarity(final_similarity)}"
    else:
        yield f"answer: {text}{_similarity(audit.get('similarity'))}"
    if audit:
        yield f"uncompressed: {_text(audit['answer'])}"


def _text(answer: str | None) -> str:
    return "none" if answer is None else answer


def _similarity(similarity: float | None) -> str:
    """Similarity of an answer to the uncompressed one."""
    return "" if similarity is None else f" (similarity {similarity:.3f})"


def image_name(output: str, key: str) -> str:
    """File name for the token map of a row."""
    last = output.rstrip("/").split("/")[-1]
    return f"{last}-{''.join(c if c.isalnum() or c in '.-_' else '_' for c in key)}.png"

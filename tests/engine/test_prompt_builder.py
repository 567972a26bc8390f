"""From a request to its prompt: its image, its visual tokens and their positions."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gc2ray.compression.policy import policies_of
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import ImageRef
from gc2ray.engine.prompt_builder import PromptBuilder, load_tiles, tiles_of
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from tests.support.engines import (
    NEW_TOKENS,
    QUESTIONS,
    PatientEngine,
    answers_of,
    make_engine,
    rows_of_one_image,
    tokens_of,
    with_adapter,
)
from tests.support.greedy import plain_greedy
from tests.support.images import POLICY, anyres, refusal_message
from tests.support.methods import SOURCE, write_method
from tests.support.rows import SIZES, encoded, make_recipe, request, requests


def test_undecodable_file_is_named(tmp_path):
    (tmp_path / "page.png").write_bytes(b"<html>")
    policy = ImageLimits(roots=(str(tmp_path),))
    message = refusal_message(load_tiles, ImageRef(path="page.png"), anyres(), policy)
    assert "not an image" in message
    assert message.endswith(": page.png")


def test_rotated_jpeg_swaps_sides():
    exif = Image.Exif()
    exif[0x0112] = 6
    ref = ImageRef(data=encoded(Image.new("RGB", (800, 400)), "JPEG", exif=exif))
    tiles = load_tiles(ref, anyres(), POLICY)
    assert tiles.size == (800, 400)
    assert anyres().cut(tiles.size).grid == (2, 1)


@pytest.mark.parametrize("retention", [1.0, 0.25, 0.05])
def test_token_counts_add_up(loaded: LoadedModel, retention: float) -> None:
    engine = make_engine(loaded, compression__retention=retention)
    rows = requests()
    for row, answer in zip(rows, answers_of(engine, rows), strict=True):
        (views,) = answer.kept_per_view
        assert sum(views) == answer.visual_tokens_kept <= answer.visual_tokens_full
        assert answer.retention_actual == answer.visual_tokens_kept / answer.visual_tokens_full
        assert answer.prompt_tokens == len(engine.prompts([row])[0])
        read = around_image(loaded) + answer.visual_tokens_kept + answer.newline_tokens
        assert answer.prompt_tokens == read
        assert answer.output_tokens == len(answer.token_ids) == NEW_TOKENS
        assert 0 < answer.newline_tokens <= answer.newline_tokens_full
        assert answer.retention_requested == retention


def around_image(loaded: LoadedModel) -> int:
    """Tokens of the rendered prompt beside the image, by the stock tokenizer."""
    text = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    return len(loaded.processor.tokenizer(text).input_ids) - 1


def test_full_retention_keeps_everything(loaded: LoadedModel) -> None:
    engine = make_engine(loaded, compression__retention=1.0)
    for answer in engine.stream(requests()):
        assert answer.retention_actual == 1.0
        assert answer.newline_tokens == answer.newline_tokens_full
        assert answer.kv_bytes == answer.kv_bytes_full


def test_full_token_counts_do_not_depend_on_the_method(loaded: LoadedModel) -> None:
    def counted(**changes: Any) -> list[tuple[int | None, ...]]:
        answers = answers_of(make_engine(loaded, **changes), requests())
        return [(a.visual_tokens_full, a.newline_tokens_full, a.kv_bytes_full) for a in answers]

    expected = counted(compression__method="none")
    assert counted(compression__method="thumbnail") == expected
    assert counted(compression__retention=0.1) == expected


def test_shares_of_a_batch_sum_to_the_stage_exactly(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(0, 100_003)  # a device clock that ticks once a look
    monkeypatch.setattr("gc2ray.engine.prompt_builder.PromptBuilder._now", lambda _: next(ticks))
    recipe = make_recipe("unused", generation__max_new_tokens=NEW_TOKENS)
    answers = answers_of(PatientEngine(loaded, recipe, Cluster(views_per_batch=100)), requests())
    for stage in ("encode", "compress"):
        shares = [answer.stage_ns[stage] for answer in answers]
        assert sum(shares) == 100_003
        assert max(shares) - min(shares) > 1, "shared out evenly, not by size"


def test_the_vision_tower_is_timed_whole(loaded: LoadedModel) -> None:
    watched, adapter = with_adapter(loaded)
    started = time.perf_counter_ns()
    answers = list(make_engine(watched).stream(requests()))
    passed = time.perf_counter_ns() - started
    assert adapter.ns <= sum(answer.stage_ns["encode"] for answer in answers) <= passed


def test_a_prompt_that_is_too_long_fails_alone(loaded: LoadedModel) -> None:
    """The longest prompt that fits, and one token more."""
    rows = [request((25, 30), 0), request((480, 640), 1)]
    lengths = [len(prompt) for prompt in make_engine(loaded).prompts(rows)]
    assert lengths[0] < lengths[1]
    for limit, status in (
        (lengths[1] + NEW_TOKENS, Status.OK),
        (lengths[1] + NEW_TOKENS - 1, Status.TOO_LONG),
    ):
        small, _ = with_adapter(loaded, max_positions=limit)
        answers = answers_of(make_engine(small), rows)
        assert [answer.status for answer in answers] == [Status.OK, status]
    assert answers[1].error == (
        f"{lengths[1]} prompt tokens and {NEW_TOKENS} new ones; the model reads at most {limit}"
    )


def test_what_is_too_long_whatever_is_kept_costs_no_tower_and_no_embeddings(
    loaded: LoadedModel,
) -> None:
    """Nor the image that another row shows, too."""
    rows = [
        request((480, 640), 0),
        replace(request((480, 640), 0), row=1, prompts=("word " * 3000,)),
    ]
    (length,) = [len(prompt) for prompt in make_engine(loaded).prompts(rows[:1])]
    embedded: list[int] = []

    def embed(token_ids: Any, *others: Any) -> Any:
        embedded.append(len(token_ids))
        return loaded.adapter.embed(token_ids, *others)

    small, adapter = with_adapter(loaded, max_positions=length + NEW_TOKENS, embed=embed)
    answers = answers_of(make_engine(small), rows)
    assert [answer.status for answer in answers] == [Status.OK, Status.TOO_LONG]
    assert re.fullmatch(
        rf"at least \d+ prompt tokens and {NEW_TOKENS} new ones; the model reads at most \d+",
        answers[1].error or "",
    )
    assert sum(adapter.batches) == len(embedded) == 1
    small, adapter = with_adapter(loaded, max_positions=NEW_TOKENS + 100, embed=embed)
    (answer,) = answers_of(make_engine(small, compression__retention=1.0), rows[:1])
    assert (answer.status, adapter.batches) == (Status.TOO_LONG, [])


def test_a_row_that_fits_is_answered_whatever_an_own_method_says_it_keeps(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bounds` of one that keeps a token a view says that it keeps its share."""
    source = SOURCE + (
        "\n    def keep(self, batch):\n"
        "        kept = super().keep(batch)\n"
        "        return kept & (kept.cumsum(1) == 1)\n"
    )
    write_method(tmp_path, "sparing", source)
    monkeypatch.syspath_prepend(tmp_path)
    own = {"compression__method": "sparing:Own", "compression__allow_code": True}
    rows = [request((480, 640), 0)]
    (prompt,) = make_engine(loaded, **own).prompts(rows)
    assert len(prompt) < len(make_engine(loaded).prompts(rows)[0])
    small, _ = with_adapter(loaded, max_positions=len(prompt) + NEW_TOKENS)
    (answer,) = answers_of(make_engine(small, **own), rows)
    assert (answer.status, answer.error) == (Status.OK, None)


@pytest.mark.parametrize("newlines", ["all", "none"])
@pytest.mark.parametrize("method", ["globalcom2", "pool", "thumbnail"])
def test_newlines_are_counted_as_they_were_read(
    loaded: LoadedModel, method: str, newlines: str
) -> None:
    changes = {"compression__method": method, "compression__newlines": newlines}
    engine = make_engine(loaded, **changes)
    plain = answers_of(make_engine(loaded, compression__method=method), requests())
    for row, answer, before in zip(requests(), answers_of(engine, requests()), plain, strict=True):
        assert answer.newline_tokens == (answer.newline_tokens_full if newlines == "all" else 0)
        assert answer.kept_per_view == before.kept_per_view
        assert answer.newline_tokens_full == before.newline_tokens_full
        read = around_image(loaded) + answer.visual_tokens_kept + answer.newline_tokens
        assert answer.prompt_tokens == read == len(engine.prompts([row])[0])
        assert answer.kv_bytes == (read + answer.output_tokens) * loaded.adapter.kv_bytes_per_token


@pytest.mark.parametrize("retention", [1.0, 0.25, 0.05])
@pytest.mark.parametrize("newlines", ["kept_rows", "all", "none"])
def test_original_positions_are_those_of_the_uncompressed_prompt(
    loaded: LoadedModel, retention: float, newlines: str
) -> None:
    whole = make_engine(loaded, compression__method="none").prompts(requests())
    packing = {"compression__retention": retention, "compression__newlines": newlines}
    compact = make_engine(loaded, **packing).prompts(requests())
    original = make_engine(loaded, compression__positions="original", **packing)
    for prompt, same, full in zip(original.prompts(requests()), compact, whole, strict=True):
        assert torch.equal(prompt.embeds, same.embeds)
        assert prompt.visual == same.visual
        assert same.positions is None
        assert prompt.positions is not None
        found, ((first, stop),) = prompt.positions.tolist(), prompt.visual
        (_, full_stop) = full.visual[0]
        assert found[:first] == list(range(first))
        assert found[stop:] == list(range(full_stop, len(full)))
        assert found == sorted(set(found))
        if retention == 1 and newlines != "none":
            assert found == list(range(len(full)))
        elif retention == 1:  # what is left is the full prompt at those positions
            torch.testing.assert_close(full.embeds[found], prompt.embeds)


def test_original_positions_at_retention_one_answer_as_stock_does(loaded: LoadedModel) -> None:
    """And say something else where tokens were dropped: otherwise this could not fail."""

    def answered(**packing: Any) -> list[tuple[int, ...]]:
        prompts = make_engine(loaded, compression__positions="original", **packing).prompts(rows)
        eos = [loaded.model.generation_config.eos_token_id]
        return [
            tuple(plain_greedy(loaded.model, prompt.embeds, prompt.positions, NEW_TOKENS, eos))
            for prompt in prompts
            if prompt.positions is not None
        ]

    rows = requests(SIZES[:4])
    full = make_engine(loaded, compression__retention=1.0)
    assert answered(compression__retention=1.0) == tokens_of(full, rows)
    assert answered(compression__retention=0.25) != tokens_of(make_engine(loaded), rows)


def test_a_prompt_with_gaps_is_as_long_as_its_largest_position(loaded: LoadedModel) -> None:
    rows = [request((480, 640), 1)]
    (full,) = make_engine(loaded, compression__method="none").prompts(rows)
    needed = len(full) + NEW_TOKENS
    for limit, fits in ((needed, True), (needed - 1, False)):
        small, _ = with_adapter(loaded, max_positions=limit)
        (prompt,) = make_engine(small).prompts(rows)
        assert len(prompt) < needed - NEW_TOKENS
        engine = make_engine(small, compression__positions="original")
        if fits:
            assert len(engine.prompts(rows)) == 1
        else:
            with pytest.raises(BadRow) as caught:
                engine.prompts(rows)
            assert caught.value.status is Status.TOO_LONG
            assert caught.value.message == (
                f"{len(prompt)} prompt tokens at positions up to {len(full) - 1} and {NEW_TOKENS} "
                f"new ones; the model reads at most {limit}"
            )


def make_prompt_builder(loaded: LoadedModel) -> PromptBuilder:
    recipe = make_recipe("unused", generation__max_new_tokens=NEW_TOKENS)
    chat = ChatPrompt(loaded.processor)
    return PromptBuilder(
        loaded.adapter, chat, recipe, policies_of(recipe, {}), cached_image_bytes=0
    )


def test_a_failed_image_is_encoded_again_for_later_rows(loaded: LoadedModel) -> None:
    broken, adapter = with_adapter(loaded, error=RuntimeError("not now"))
    builder = make_prompt_builder(broken)
    first, second = rows_of_one_image(0, QUESTIONS[:2])
    (failed,) = builder.encode([builder.open(first)])
    assert failed.failure is not None
    adapter.error = None
    later = builder.open(second)  # while the row that failed, and its picture, are still there
    assert later.cached_images[0] is not failed.cached_images[0]
    assert builder.encode([later])[0].prompt is not None


def test_a_row_waits_for_the_image_that_another_decodes(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        started.set()
        assert go.wait(30)
        return tiles_of(*arguments, **named)

    monkeypatch.setattr("gc2ray.engine.prompt_builder.tiles_of", slow)
    builder = make_prompt_builder(loaded)
    first, second = rows_of_one_image(0, QUESTIONS[:2])
    with ThreadPoolExecutor(2) as pool:
        decoding = pool.submit(builder.open, first)
        assert started.wait(30)
        row = builder.open(second)
        assert row.cached_images[0].row_count == 2
        encoding = pool.submit(builder.encode, [row])
        time.sleep(0.05)
        go.set()
        assert encoding.result()[0].prompt is not None
        assert decoding.result().failure is None

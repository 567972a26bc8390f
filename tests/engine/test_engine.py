"""The engine: one answer per row, whatever happens; and numbers that add up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.policy import policies_of
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import BadRow, EngineDead, ShardError, Status
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.core.schema import stats_of
from gc2ray.core.stats import STAGES, RunStats
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.engine.engine import Engine, load_engine
from gc2ray.engine.image_cache import CachedImage, ImageCache, image_key
from gc2ray.engine.prompt_builder import PromptBuilder, tiles_of
from gc2ray.models.base import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.flops import AnswerTokens, demand_of
from gc2ray.models.llama import LanguageModel
from tests.support.greedy import plain_greedy
from tests.support.rows import SIZES, encoded, make_recipe, picture, request, requests

NEW = 6


@pytest.fixture
def loaded(loaded_models: dict[str, LoadedModel]) -> LoadedModel:
    return loaded_models["mistral"]


def make_engine(loaded: LoadedModel, cluster: Cluster | None = None, **changes: Any) -> Engine:
    settings = {"generation__max_new_tokens": NEW, **changes}
    return Engine(loaded, make_recipe("unused", **settings), cluster or Cluster())


def answers_of(engine: Engine, rows: Iterable[Request]) -> list[Answer]:
    """Answers in order of their rows."""
    return sorted(engine.stream(rows), key=lambda answer: answer.request.row)


def tokens_of(engine: Engine, rows: Iterable[Request]) -> list[tuple[int, ...]]:
    answers = answers_of(engine, rows)
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.token_ids for answer in answers]


class OtherAdapter:
    """An adapter whose `encode` is watched, or fails, and that may have other limits."""

    def __init__(self, adapter: Any, **changes: Any) -> None:
        self._adapter = adapter
        self.error: Exception | None = None
        self.on_size: tuple[int, int] | None = None
        self.batches: list[int] = []
        self.ns = 0
        vars(self).update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def encode(self, tiles: Any, seeds: Any) -> Any:
        self.batches.append(len(tiles))
        if self.error and (self.on_size is None or self.on_size in [t.size for t in tiles]):
            raise self.error
        started = time.perf_counter_ns()
        views = self._adapter.encode(tiles, seeds)
        self.ns += time.perf_counter_ns() - started
        return views


def with_adapter(loaded: LoadedModel, **changes: Any) -> tuple[LoadedModel, OtherAdapter]:
    adapter = OtherAdapter(loaded.adapter, **changes)
    return replace(loaded, adapter=adapter), adapter


def mixed_rows() -> list[Request]:
    """Good and bad rows; the number of a row is its place."""
    good = encoded(picture((100, 200), 1))
    images = {
        0: ImageRef(good),
        1: ImageRef(good[: len(good) // 2]),
        2: ImageRef(),
        3: ImageRef(good),
        4: ImageRef(b""),
        5: ImageRef(b"GIF89a" + b"\0" * 40),
        6: ImageRef(path="/etc/passwd"),
        7: ImageRef(encoded(picture((25, 30), 2), "JPEG")),
    }
    fault = BadRow(Status.BAD_PROMPT, "prompt column 'q' is null")
    rows = [replace(request(seed=n), images=(image,)) for n, image in images.items()]
    rows[3] = replace(rows[3], prompts=(), fault=fault)
    return rows


def test_every_row_gets_one_answer_with_its_status(loaded: LoadedModel) -> None:
    answers = answers_of(make_engine(loaded), mixed_rows())
    assert [answer.request.row for answer in answers] == list(range(8))
    bad = Status.BAD_IMAGE
    assert [answer.status for answer in answers] == [
        Status.OK, bad, bad, Status.BAD_PROMPT, bad, bad, bad, Status.OK
    ]  # fmt: skip
    assert answers[3].error == "prompt column 'q' is null"
    assert all((answer.error is None) == (answer.status is Status.OK) for answer in answers)


def test_a_bad_row_has_nothing_measured_but_its_image(loaded: LoadedModel) -> None:
    answer = answers_of(make_engine(loaded), mixed_rows())[1]
    assert set(answer.stage_ns) == {"image"}
    assert (answer.answer, answer.prompt_tokens, answer.kept_per_view) == (None, None, None)
    assert (answer.method, answer.retention_requested) == ("globalcom2", 0.25)
    assert (answer.device, answer.token_ids) == ("cpu", ())


def test_bad_rows_change_nothing_for_good_ones(loaded: LoadedModel) -> None:
    rows = mixed_rows()
    answers = answers_of(make_engine(loaded), rows)
    alone = answers_of(make_engine(loaded), [rows[0], rows[7]])
    assert [answers[0].token_ids, answers[7].token_ids] == [a.token_ids for a in alone]


def test_no_rows_no_answers(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    assert list(engine.stream([])) == []


def test_an_engine_streams_again(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    rows = requests(SIZES[:2])
    assert tokens_of(engine, rows) == tokens_of(engine, rows)


def test_a_row_remembers_what_was_carried_but_not_its_image(loaded: LoadedModel) -> None:
    row = replace(request(), carried={"id": 5})
    (answer,) = make_engine(loaded).stream([row])
    assert answer.request == replace(row, images=())


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
        assert answer.output_tokens == len(answer.token_ids) == NEW
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


def test_kv_bytes_are_those_of_the_config(loaded: LoadedModel) -> None:
    text = loaded.model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    for answer in make_engine(loaded).stream(requests()):
        assert answer.kv_bytes == (answer.prompt_tokens + NEW) * per_token
        dropped = answer.visual_tokens_full - answer.visual_tokens_kept
        bare = answer.newline_tokens_full - answer.newline_tokens
        assert answer.kv_bytes_full == answer.kv_bytes + (dropped + bare) * per_token
        assert dropped > 0


def test_an_answer_asks_what_its_tokens_do(loaded: LoadedModel) -> None:
    """The demand follows from what is written of the answer, and from the model's sizes."""
    shape = loaded.adapter.shape
    for answer in answers_of(make_engine(loaded, compression__retention=0.25), requests()):
        views, newlines = answer.kept_per_view, answer.newline_tokens
        assert views is not None
        assert answer.prompt_tokens is not None
        tokens = AnswerTokens(
            views=len(views[0]),
            projected=(answer.visual_tokens_kept or 0) + (newlines or 0),
            prompt=answer.prompt_tokens,
            output=len(answer.token_ids),
        )
        assert answer.demand == demand_of(shape, tokens)
        full = (answer.visual_tokens_full or 0) + (answer.newline_tokens_full or 0)
        assert answer.demand_full == demand_of(shape, tokens.with_more(full - tokens.projected))
        assert answer.full_per_view is not None
        assert sum(answer.full_per_view[0]) == answer.visual_tokens_full


def test_uncompressed_answers_ask_what_they_would_uncompressed(loaded: LoadedModel) -> None:
    for answer in answers_of(make_engine(loaded, compression__retention=1.0), requests()):
        assert answer.demand == answer.demand_full
        assert answer.full_per_view == answer.kept_per_view


def test_forwards_are_counted(loaded: LoadedModel) -> None:
    """One row at a time takes one for each token; several together take fewer."""
    alone, together = make_engine(loaded, Cluster(live_rows=1)), make_engine(loaded)
    tokens = sum(len(answer.token_ids) for answer in answers_of(alone, requests()))
    assert alone.totals().decode_steps == tokens
    answers_of(together, requests())
    assert NEW <= together.totals().decode_steps < tokens
    assert together.totals().energy_millijoules == 0  # a CPU does not tell


def test_every_stage_is_timed(loaded: LoadedModel) -> None:
    for answer in make_engine(loaded).stream(requests()):
        assert set(answer.stage_ns) == set(STAGES)
        assert all(ns > 0 for ns in answer.stage_ns.values())


class Patient(Engine):
    """Encodes no part of a batch: it waits until so many rows are at hand."""

    rows = 7

    def _worth_encoding(self, batch: Sequence[Any]) -> bool:
        return len(batch) >= self.rows


def test_shares_of_a_batch_sum_to_the_stage_exactly(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count(0, 100_003)  # a device clock that ticks once a look
    monkeypatch.setattr("gc2ray.engine.prompt_builder.PromptBuilder._now", lambda _: next(ticks))
    recipe = make_recipe("unused", generation__max_new_tokens=NEW)
    answers = answers_of(Patient(loaded, recipe, Cluster(views_per_batch=100)), requests())
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


def test_a_prompt_that_is_too_long_is_its_own_trouble(loaded: LoadedModel) -> None:
    """The longest prompt that fits, and one token more."""
    rows = [request((25, 30), 0), request((480, 640), 1)]
    lengths = [len(prompt) for prompt in make_engine(loaded).prompts(rows)]
    assert lengths[0] < lengths[1]
    for limit, status in ((lengths[1] + NEW, Status.OK), (lengths[1] + NEW - 1, Status.TOO_LONG)):
        small, _ = with_adapter(loaded, max_positions=limit)
        answers = answers_of(make_engine(small), rows)
        assert [answer.status for answer in answers] == [Status.OK, status]
    assert answers[1].error == (
        f"{lengths[1]} prompt tokens and {NEW} new ones; the model reads at most {limit}"
    )


@pytest.mark.parametrize("newlines", ["all", "none"])
@pytest.mark.parametrize("method", ["globalcom2", "globalcom2-reference", "pool", "thumbnail"])
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
            tuple(plain_greedy(loaded.model, prompt.embeds, prompt.positions, NEW, eos))
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
    needed = len(full) + NEW
    for limit, fits in ((needed, True), (needed - 1, False)):
        small, _ = with_adapter(loaded, max_positions=limit)
        (prompt,) = make_engine(small).prompts(rows)
        assert len(prompt) < needed - NEW
        engine = make_engine(small, compression__positions="original")
        if fits:
            assert len(engine.prompts(rows)) == 1
        else:
            with pytest.raises(BadRow) as caught:
                engine.prompts(rows)
            assert caught.value.status is Status.TOO_LONG
            assert caught.value.message == (
                f"{len(prompt)} prompt tokens at positions up to {len(full) - 1} and {NEW} new "
                f"ones; the model reads at most {limit}"
            )


def test_rows_are_answered_while_the_reader_waits(loaded: LoadedModel) -> None:
    """A reader with nothing at hand must not hold back rows that are already read."""
    seen: list[int] = []
    waiting: list[list[int]] = []

    def until(rows: int) -> None:
        for _ in range(6000):
            if len(seen) < rows:
                time.sleep(0.01)
        waiting.append(sorted(seen))

    def feed() -> Iterator[Request]:
        yield request(seed=0)
        yield request(seed=1)
        until(2)
        yield request(seed=2)
        until(3)

    engine = make_engine(loaded)
    for answer in engine.stream(feed()):
        seen.append(answer.request.row)
    assert waiting == [[0, 1], [0, 1, 2]]
    assert engine.totals().input_starved_ns > 0


@pytest.mark.parametrize("error", [ValueError("odd image"), torch.OutOfMemoryError("no room")])
def test_trouble_in_a_batch_ends_with_the_row_that_made_it(
    loaded: LoadedModel, error: Exception
) -> None:
    rows = requests()
    expected = tokens_of(make_engine(loaded), rows)
    broken, adapter = with_adapter(loaded, error=error, on_size=SIZES[4])
    recipe = make_recipe("unused", generation__max_new_tokens=NEW)
    answers = answers_of(Patient(broken, recipe, Cluster(views_per_batch=100)), rows)
    assert adapter.batches[0] == len(rows)
    assert [answer.token_ids for answer in answers if answer.error is None] == [
        tokens for place, tokens in enumerate(expected) if place != 4
    ]
    oom = isinstance(error, torch.OutOfMemoryError)
    assert [answer.oom_splits for answer in answers] == ([1, 1, 1, 3, 3, 2, 2] if oom else [0] * 7)
    assert answers[4].status is (Status.OUT_OF_MEMORY if oom else Status.FAILED)
    assert oom or answers[4].error == "ValueError: odd image"


def test_a_batch_that_fails_late_is_tried_again_whole(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is short once, for the third picture's tokens: no row is worse off for it."""
    rows = requests()
    expected = tokens_of(make_engine(loaded), rows)
    clone, width = torch.Tensor.clone, loaded.model.config.text_config.hidden_size
    copied: list[int] = []

    def scarce(tensor: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if tensor.dim() == 2 and tensor.shape[1] == width:
            copied.append(len(tensor))
            if len(copied) == 3:
                raise torch.OutOfMemoryError("no room")
        return clone(tensor, *rest, **named)

    recipe = make_recipe("unused", generation__max_new_tokens=NEW)
    engine = Patient(loaded, recipe, Cluster(views_per_batch=100))
    monkeypatch.setattr(torch.Tensor, "clone", scarce)
    assert tokens_of(engine, rows) == expected
    assert len(copied) == 3 + len(rows)


def test_an_error_message_is_one_bounded_line(loaded: LoadedModel) -> None:
    broken, _ = with_adapter(loaded, error=ValueError("a\n  b" * 1000))
    (answer,) = make_engine(broken).stream([request()])
    assert answer.error.startswith("ValueError: a b")
    assert "\n" not in answer.error
    assert len(answer.error) == 300


@pytest.mark.parametrize("method", ["globalcom2", "none"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_whose_scores_are_not_finite_fails_alone(
    loaded: LoadedModel, value: float, method: str
) -> None:
    """Whatever the method: such a tower's features are no better. Rows that share it fail, too."""

    class Overflowing(OtherAdapter):
        def encode(self, tiles: Any, seeds: Any) -> Any:
            views = super().encode(tiles, seeds)
            for image, view in zip(tiles, views, strict=True):
                if image.size == SIZES[2]:
                    view.scores[-1, 3] = value
            return views

    rows = requests(SIZES[:5])
    rows.append(replace(rows[2], row=5, row_key="rows.parquet#5"))
    wanted = tokens_of(make_engine(loaded, compression__method=method), rows)
    broken = replace(loaded, adapter=Overflowing(loaded.adapter))
    answers = answers_of(make_engine(broken, compression__method=method), rows)
    assert [a.status is Status.OK for a in answers] == [True, True, False, True, True, False]
    for at in (2, 5):
        assert answers[at].status is Status.FAILED
        assert "scores of the image are not finite" in answers[at].error
    good = (0, 1, 3, 4)
    assert [answers[at].token_ids for at in good] == [wanted[at] for at in good]


@pytest.mark.parametrize("decoder", ["native", "generate"])
def test_a_row_whose_logits_are_not_finite_says_so(
    loaded: LoadedModel, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projector that overflows on one image: only its row fails, and its answer is no answer."""

    class Overflowing(OtherAdapter):
        def pack(self, views: Any, selections: Any) -> Any:
            packed = [part.clone() for part in self._adapter.pack(views, selections)]
            for view, part in zip(views, packed, strict=True):
                if view.size == SIZES[1]:
                    part[-1] = torch.inf
            return packed

    if decoder == "generate":
        monkeypatch.setattr("gc2ray.engine.engine.unsupported", lambda model: "it is new")
    rows = requests(SIZES[:4])
    wanted = tokens_of(make_engine(loaded), rows)
    broken = replace(loaded, adapter=Overflowing(loaded.adapter))
    answers = answers_of(make_engine(broken), rows)
    assert [a.status for a in answers] == [Status.OK, Status.FAILED, Status.OK, Status.OK]
    assert (answers[1].answer, answers[1].token_ids) == (None, ())
    assert "logits are not finite (NaN or infinite) after 0 tokens" in answers[1].error
    assert "recipe.model.dtype" in answers[1].error
    assert [answers[at].token_ids for at in (0, 2, 3)] == [wanted[at] for at in (0, 2, 3)]


def test_a_row_that_does_not_fit_the_decoder_is_out_of_memory(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(LanguageModel, "logits", logits)
    answers = answers_of(make_engine(loaded), requests(SIZES[:3]))
    assert [answer.status for answer in answers] == [Status.OUT_OF_MEMORY] * 3
    assert {"image", "encode", "compress"} <= set(answers[0].stage_ns)


def test_a_lost_device_ends_the_engine(loaded: LoadedModel) -> None:
    broken, adapter = with_adapter(loaded, error=torch.AcceleratorError("CUDA error"))
    with pytest.raises(EngineDead, match="the device is lost: CUDA error"):
        list(make_engine(broken).stream(requests()))
    assert len(adapter.batches) == 1, "tried again on a dead device"


def test_a_device_lost_while_decoding_ends_the_engine(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error")

    monkeypatch.setattr(LanguageModel, "logits", logits)
    with pytest.raises(EngineDead, match="the device is lost"):
        list(make_engine(loaded).stream([request()]))


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_both_decoders_give_the_same_answers(
    loaded: LoadedModel, temperature: float, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A language model that continuous batching does not know is decoded by stock `generate`."""
    native = make_engine(loaded, generation__temperature=temperature)
    monkeypatch.setattr("gc2ray.engine.engine.unsupported", lambda model: "it is new")
    stock = make_engine(loaded, generation__temperature=temperature)
    assert isinstance(stock._decoder, GenerateDecoder)
    assert "it is new" in caplog.text
    assert tokens_of(native, requests()) == tokens_of(stock, requests())


class Forgetful:
    """A decoder that takes prompts and never gives them back."""

    wants_more, oom_splits = True, 0

    def clear_cache(self) -> None:
        pass

    def submit(self, *_: Any) -> bool:
        return True

    def step(self) -> list[Any]:
        return []

    def __len__(self) -> int:
        return 0


def test_a_lost_row_is_not_passed_over_in_silence(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    engine._decoder = Forgetful()
    with pytest.raises(EngineDead, match="the decoder lost 1 rows"):
        list(engine.stream([request()]))


def test_prompts_raise_for_the_first_bad_row(loaded: LoadedModel) -> None:
    engine = make_engine(loaded)
    with pytest.raises(BadRow) as caught:
        engine.prompts(mixed_rows())
    assert caught.value.status is Status.BAD_IMAGE


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize("method", ["globalcom2", "random"])
def test_an_answer_does_not_depend_on_its_batch(
    loaded: LoadedModel, method: str, temperature: float
) -> None:
    changes = {"compression__method": method, "generation__temperature": temperature}
    rows = requests()
    alone = Cluster(views_per_batch=1, live_rows=1, image_threads=1)
    one = tokens_of(make_engine(loaded, alone, **changes), rows)
    wide = Cluster(views_per_batch=100, kv_tokens=100_000)
    all_ = tokens_of(make_engine(loaded, wide, **changes), rows[::-1])
    assert one == all_
    assert len(set(one)) > 1


def test_batch_sizes_are_kept(loaded: LoadedModel) -> None:
    watched, adapter = with_adapter(loaded)
    rows = [request((40, 300), seed) for seed in range(6)]  # a thumbnail and three crops
    engine = Patient(watched, make_recipe("unused"), Cluster(views_per_batch=8))
    engine.rows = 2
    list(engine.stream(rows))
    assert adapter.batches == [2, 2, 2]
    adapter.batches.clear()
    list(make_engine(watched, Cluster(views_per_batch=8)).stream(rows))
    assert sum(adapter.batches) == 6
    assert max(adapter.batches) <= 2


def test_the_seed_is_of_the_row_and_of_the_recipe(loaded: LoadedModel) -> None:
    rows = [replace(request(seed=0), row_key=f"a#{row}", row=row) for row in range(3)]

    def drawn(seed: int) -> list[tuple[int, ...]]:
        changes = {"generation__temperature": 1.5, "generation__seed": seed}
        return tokens_of(make_engine(loaded, **changes), rows)

    assert drawn(1) == drawn(1)
    assert len({*drawn(1), *drawn(2)}) == 6


def test_an_engine_is_loaded_by_its_recipe(tiny_paths: dict[str, Path]) -> None:
    recipe = make_recipe(tiny_paths["mistral"], generation__max_new_tokens=NEW)
    engine = load_engine(recipe, Cluster())
    assert engine.device == "cpu"
    assert engine.totals() == RunStats()
    (answer,) = engine.stream([request()])
    assert (answer.status, answer.finish_reason) == (Status.OK, "length")
    assert answer.answer == engine_text(tiny_paths, answer)


def engine_text(tiny_paths: dict[str, Path], answer: Answer) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_paths["mistral"])
    return tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()


def test_a_storage_that_fails_is_not_the_rows_fault(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outage(*_: Any) -> None:
        raise ShardError("the image store does not answer")

    monkeypatch.setattr("gc2ray.engine.prompt_builder.read_bytes", outage)
    (answer,) = make_engine(loaded).stream([request()])
    assert answer.is_retryable
    assert answer.error == "ShardError: the image store does not answer"


def test_a_bad_row_is_not_to_be_tried_again(loaded: LoadedModel) -> None:
    (answer,) = make_engine(loaded).stream([replace(request(), prompts=())])
    assert (answer.is_retryable, answer.error) == (
        False,
        "a request has one image and one prompt, for now",
    )


# Rows that show the same image


def questions(seed: int, prompts: Sequence[str]) -> list[Request]:
    return [
        replace(request((40, 300), seed), row=row, row_key=f"rows#{row}", prompts=(prompt,))
        for row, prompt in enumerate(prompts)
    ]


ASKED = ("What is it?", "How many objects are there?", "Which colour is it?", "Describe it.")


def make_vision(loaded: LoadedModel) -> PromptBuilder:
    recipe = make_recipe("unused", generation__max_new_tokens=NEW)
    chat = ChatPrompt(loaded.processor)
    return PromptBuilder(
        loaded.adapter, chat, recipe, policies_of(recipe, {}), cached_image_bytes=0
    )


def test_what_went_wrong_with_a_picture_is_not_held_against_later_rows(loaded: LoadedModel) -> None:
    broken, adapter = with_adapter(loaded, error=RuntimeError("not now"))
    vision = make_vision(broken)
    first, second = questions(0, ASKED[:2])
    (failed,) = vision.encode([vision.open(first)])
    assert failed.failure is not None
    adapter.error = None
    later = vision.open(second)  # while the row that failed, and its picture, are still there
    assert not later.shares_image
    assert vision.encode([later])[0].prompt is not None


def test_a_row_waits_for_the_picture_that_another_decodes(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        started.set()
        assert go.wait(30)
        return tiles_of(*arguments)

    monkeypatch.setattr("gc2ray.engine.prompt_builder.tiles_of", slow)
    vision = make_vision(loaded)
    first, second = questions(0, ASKED[:2])
    with ThreadPoolExecutor(2) as pool:
        decoding = pool.submit(vision.open, first)
        assert started.wait(30)
        row = vision.open(second)
        assert row.shares_image
        encoding = pool.submit(vision.encode, [row])
        time.sleep(0.05)
        go.set()
        assert encoding.result()[0].prompt is not None
        assert decoding.result().failure is None


@pytest.mark.parametrize("method", ["globalcom2", "random", "pool"])
def test_rows_that_show_one_image_share_it_and_answer_the_same(
    loaded: LoadedModel, method: str
) -> None:
    watched, adapter = with_adapter(loaded)
    rows = questions(3, ASKED)
    alone = [tokens_of(make_engine(loaded, compression__method=method), [row])[0] for row in rows]
    assert len(set(alone)) > 1, "all answers alike: nothing could fail"
    engine = make_engine(watched, compression__method=method)
    answers = answers_of(engine, rows)
    assert [answer.token_ids for answer in answers] == alone
    assert sum(adapter.batches) == 1, "the image was encoded again"
    assert sorted(answer.image_shared for answer in answers) == [False, True, True, True]
    total = stats_of(answers)
    assert total.images_shared == 3
    assert total.visual_tokens_kept == 4 * (answers[0].visual_tokens_kept or 0)
    assert sum("encode" in answer.stage_ns for answer in answers) == 1


def test_the_beginning_of_their_prompts_is_computed_once(loaded: LoadedModel) -> None:
    """Text before the image and the image: all but the question, and the answer's start."""
    engine = Patient(loaded, make_recipe("unused", generation__max_new_tokens=NEW), Cluster())
    engine.rows = 4
    answers = answers_of(engine, questions(3, ASKED))
    shared = [answer.prompt_tokens_shared for answer in answers]
    assert sorted(map(bool, shared)) == [False, True, True, True]
    prompt = engine.prompts(questions(3, ASKED)[:1])[0]
    assert max(shared) == prompt.visual[0][1]
    other = [replace(row, images=(ImageRef(encoded(picture((40, 300), 4))),)) for row in
             questions(3, ASKED)[:1]]  # fmt: skip
    engine.rows = 1
    assert answers_of(engine, other)[0].prompt_tokens_shared == 0


def test_what_is_shared_asks_for_nothing(loaded: LoadedModel) -> None:
    recipe = make_recipe("unused", generation__max_new_tokens=NEW, compression__retention=0.25)
    engine = Patient(loaded, recipe, Cluster())
    engine.rows = 4
    answers = answers_of(engine, questions(3, ASKED))
    stats, shape = stats_of(answers), loaded.adapter.shape
    assert (stats.images, stats.images_shared) == (1, 3)
    views = len(answers[0].kept_per_view[0] if answers[0].kept_per_view else ())
    assert stats.flops["encode"] == stats.flops_full["encode"] == shape.tower.needed(views)
    kept, full = stats.visual_tokens_kept // 4, stats.visual_tokens_full // 4
    assert stats.flops["compress"] == shape.tower.projector(kept + stats.newline_tokens // 4)
    whole = full + stats.newline_tokens_full // 4
    assert stats.flops_full["compress"] == shape.tower.projector(whole)
    for answer in answers:
        assert answer.demand is not None
        assert answer.demand_full is not None
        prompt, shared = answer.prompt_tokens or 0, answer.prompt_tokens_shared
        assert answer.demand.flops["prefill"] == shape.text.needed_prefill(prompt, shared)
        more = whole - kept - stats.newline_tokens // 4
        uncompressed = shape.text.needed_prefill(prompt + more, shared and shared + more)
        assert answer.demand_full.flops["prefill"] == uncompressed


def test_prompts_alone_take_no_kv_cache(loaded: LoadedModel) -> None:
    """`gc2ray check` has two engines on one GPU."""
    engine = make_engine(loaded)
    engine.prompts([request()])
    assert "_decoder" not in vars(engine)
    list(engine.stream([request()]))
    assert "_decoder" in vars(engine)


def test_what_was_forgotten_is_encoded_again(loaded: LoadedModel) -> None:
    watched, adapter = with_adapter(loaded)
    engine = make_engine(watched)
    for _ in range(2):
        answers_of(engine, [request()])
    assert len(adapter.batches) == 1
    engine.clear_cache()
    answers_of(engine, [request()])
    assert len(adapter.batches) == 2


def test_so_is_the_beginning_of_prompts(loaded: LoadedModel) -> None:
    engine = Patient(loaded, make_recipe("unused", generation__max_new_tokens=NEW), Cluster())
    engine.rows = 4
    answers_of(engine, questions(3, ASKED))

    def ask_again() -> list[bool]:
        answers = answers_of(engine, questions(3, ASKED))
        return sorted(answer.prompt_tokens_shared > 0 for answer in answers)

    assert ask_again() == [True] * 4
    engine.clear_cache()
    assert ask_again() == [False, True, True, True]


def test_a_broken_image_is_every_rows_trouble(loaded: LoadedModel) -> None:
    cut = encoded(picture((100, 200), 1))[:200]
    rows = [replace(row, images=(ImageRef(cut),)) for row in questions(3, ASKED)]
    answers = answers_of(make_engine(loaded), [*rows, replace(request(seed=9), row=9)])
    assert [answer.status for answer in answers] == [*[Status.BAD_IMAGE] * 4, Status.OK]
    assert len({answer.error for answer in answers[:4]}) == 1


def test_a_method_that_reads_the_prompt_shares_nothing(loaded: LoadedModel) -> None:
    class Reading(GlobalCom2):
        reads_prompt: ClassVar[bool] = True

    recipe = make_recipe("unused", generation__max_new_tokens=NEW)
    watched, adapter = with_adapter(loaded)
    engine = Engine(watched, recipe, Cluster(), Reading())
    answers = answers_of(engine, questions(3, [*ASKED, ASKED[0]]))
    assert sum(adapter.batches) == 4
    assert sum(answer.image_shared for answer in answers) == 1


def test_the_vision_side_may_run_beside_the_decoder(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: on a thread of its own, one batch ahead."""
    expected = tokens_of(make_engine(loaded), requests())
    threads: set[str] = set()
    watched, adapter = with_adapter(loaded)
    encode = adapter.encode

    def noted(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name.rsplit("_", 1)[0])
        return encode(*arguments)

    adapter.encode = noted  # type: ignore[method-assign]
    executor = lambda _: ThreadPoolExecutor(1, "gc2ray-vision")  # noqa: E731
    monkeypatch.setattr(Engine, "_vision_executor", executor)
    assert tokens_of(make_engine(watched, Cluster(views_per_batch=4)), requests()) == expected
    assert threads == {"gc2ray-vision"}


def test_pictures_are_kept_within_their_bytes() -> None:
    pictures = ImageCache(kept_bytes=100)

    def made(key: str, tokens: int) -> None:
        picture_, new = pictures.find(key)
        assert new
        picture_.packed = torch.zeros(tokens, 1)
        pictures.keep(picture_)

    made("a", 10)
    made("b", 10)
    assert not pictures.find("a")[1]  # and so used after b
    made("c", 10)
    assert [pictures.find(key)[1] for key in ("a", "c", "b")] == [False, False, True]
    made("d", 26)
    assert [pictures.find(key)[1] for key in ("a", "c", "d")] == [True, True, True]


def test_a_picture_in_use_is_found_and_a_forgotten_one_is_not() -> None:
    pictures = ImageCache(kept_bytes=0)
    held, _ = pictures.find("a")
    assert pictures.find("a") == (held, False)
    assert held.row_count == 2
    pictures.discard(held)
    assert pictures.find("a")[1]


def test_an_image_is_identified_by_its_bytes() -> None:
    assert image_key(b"x") == image_key(b"x") != image_key(b"y")
    assert image_key(b"x") != image_key(b"x", "q") != image_key(b"x", "r")
    assert CachedImage(image_key(b"x")).seed == CachedImage(image_key(b"x")).seed < 2**56

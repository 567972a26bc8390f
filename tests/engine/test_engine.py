"""The engine: one answer per row, whatever happens; and numbers that add up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import BadRow, ConfigError, EngineDead, Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.stats import STAGES, RunStats
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.engine.engine import Engine, load_engine
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.flops import AnswerTokens, demand_of
from tests.support.engines import (
    NEW_TOKENS,
    PatientEngine,
    answers_of,
    make_engine,
    mixed_rows,
    tokens_of,
    with_adapter,
)
from tests.support.rows import SIZES, make_recipe, request, requests


def test_every_row_gets_one_answer_with_its_status(loaded: LoadedModel) -> None:
    answers = answers_of(make_engine(loaded), mixed_rows())
    assert [answer.request.row for answer in answers] == list(range(8))
    bad = Status.BAD_IMAGE
    assert [answer.status for answer in answers] == [
        Status.OK, bad, bad, Status.BAD_PROMPT, bad, bad, bad, Status.OK
    ]  # fmt: skip
    assert answers[3].error == "prompt column 'q' is null"
    assert all((answer.error is None) == (answer.status is Status.OK) for answer in answers)


def test_only_the_image_of_a_bad_row_is_measured(loaded: LoadedModel) -> None:
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


def test_an_answer_has_kept_columns_but_no_image(loaded: LoadedModel) -> None:
    row = replace(request(), kept_columns={"id": 5})
    (answer,) = make_engine(loaded).stream([row])
    assert answer.request == replace(row, images=())


def test_kv_bytes_are_those_of_the_config(loaded: LoadedModel) -> None:
    text = loaded.model.config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    for answer in make_engine(loaded).stream(requests()):
        assert answer.kv_bytes == (answer.prompt_tokens + NEW_TOKENS) * per_token
        dropped = answer.visual_tokens_full - answer.visual_tokens_kept
        bare = answer.newline_tokens_full - answer.newline_tokens
        assert answer.kv_bytes_full == answer.kv_bytes + (dropped + bare) * per_token
        assert dropped > 0


def test_the_demand_of_an_answer_follows_from_its_tokens(loaded: LoadedModel) -> None:
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
        prompt = tokens.prompt + full - tokens.projected
        uncompressed = replace(tokens, projected=full, prompt=prompt)
        assert answer.demand_full == demand_of(shape, uncompressed)
        assert answer.full_per_view is not None
        assert sum(answer.full_per_view[0]) == answer.visual_tokens_full


def test_an_uncompressed_answer_demands_what_is_full(loaded: LoadedModel) -> None:
    for answer in answers_of(make_engine(loaded, compression__retention=1.0), requests()):
        assert answer.demand == answer.demand_full
        assert answer.full_per_view == answer.kept_per_view


def test_forwards_are_counted(loaded: LoadedModel) -> None:
    """One row at a time takes one for each token; several together take fewer."""
    alone, together = make_engine(loaded, Cluster(live_rows=1)), make_engine(loaded)
    tokens = sum(len(answer.token_ids) for answer in answers_of(alone, requests()))
    assert alone.totals().decode_steps == tokens
    answers_of(together, requests())
    assert NEW_TOKENS <= together.totals().decode_steps < tokens
    assert together.totals().energy_millijoules == 0  # a CPU does not tell


def test_every_stage_is_timed(loaded: LoadedModel) -> None:
    for answer in make_engine(loaded).stream(requests()):
        assert set(answer.stage_ns) == set(STAGES)
        assert all(ns > 0 for ns in answer.stage_ns.values())


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


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_original_positions_are_refused_where_generate_decodes(
    loaded: LoadedModel, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a row is answered, and not by each of them."""
    monkeypatch.setattr("gc2ray.engine.engine.unsupported", lambda model: "it is new")
    if positions == "compact":
        make_engine(loaded, compression__positions=positions)
        return
    with pytest.raises(ConfigError, match="positions need the native decoder, and it is new"):
        make_engine(loaded, compression__positions=positions)


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


def test_a_row_that_the_decoder_loses_is_an_error(loaded: LoadedModel) -> None:
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
    engine = PatientEngine(watched, make_recipe("unused"), Cluster(views_per_batch=8))
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
    recipe = make_recipe(tiny_paths["mistral"], generation__max_new_tokens=NEW_TOKENS)
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


def test_prompts_alone_take_no_kv_cache(loaded: LoadedModel) -> None:
    """`gc2ray check` has two engines on one GPU."""
    engine = make_engine(loaded)
    engine.prompts([request()])
    assert "_decoder" not in vars(engine)
    list(engine.stream([request()]))
    assert "_decoder" in vars(engine)


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

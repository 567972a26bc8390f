"""What fails costs its own row only; what breaks the device ends the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import EngineDead, ShardError, Status
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.llama import LanguageModel
from tests.support.engines import (
    NEW_TOKENS,
    PatientEngine,
    WatchedAdapter,
    answers_of,
    make_engine,
    tokens_of,
    with_adapter,
)
from tests.support.rows import SIZES, make_recipe, request, requests


@pytest.mark.parametrize("error", [ValueError("odd image"), torch.OutOfMemoryError("no room")])
def test_an_error_in_a_batch_fails_only_its_row(loaded: LoadedModel, error: Exception) -> None:
    rows = requests()
    expected = tokens_of(make_engine(loaded), rows)
    broken, adapter = with_adapter(loaded, error=error, on_size=SIZES[4])
    recipe = make_recipe("unused", generation__max_new_tokens=NEW_TOKENS)
    answers = answers_of(PatientEngine(broken, recipe, Cluster(views_per_batch=100)), rows)
    assert adapter.batches[0] == len(rows)
    assert [answer.token_ids for answer in answers if answer.error is None] == [
        tokens for row, tokens in enumerate(expected) if row != 4
    ]
    oom = isinstance(error, torch.OutOfMemoryError)
    assert [answer.oom_splits for answer in answers] == ([1, 1, 1, 3, 3, 2, 2] if oom else [0] * 7)
    assert answers[4].status is (Status.OUT_OF_MEMORY if oom else Status.FAILED)
    assert oom or answers[4].error == "ValueError: odd image"


def test_a_batch_that_fails_late_is_retried_whole(
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

    recipe = make_recipe("unused", generation__max_new_tokens=NEW_TOKENS)
    engine = PatientEngine(loaded, recipe, Cluster(views_per_batch=100))
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

    class Overflowing(WatchedAdapter):
        def encode(self, tiles: Any, seeds: Any) -> Any:
            views = super().encode(tiles, seeds)
            for image, view in zip(tiles, views, strict=True):
                if image.size == SIZES[2]:
                    view.scores[-1] = value
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
def test_a_row_whose_logits_are_not_finite_has_no_answer(
    loaded: LoadedModel, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projector that overflows on one image: only its row fails, and its answer is no answer."""

    class Overflowing(WatchedAdapter):
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


def test_a_storage_that_fails_is_not_the_rows_fault(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outage(*_: Any) -> None:
        raise ShardError("the image store does not answer")

    monkeypatch.setattr("gc2ray.engine.prompt_builder.read_bytes", outage)
    (answer,) = make_engine(loaded).stream([request()])
    assert answer.is_retryable
    assert answer.error == "ShardError: the image store does not answer"


def test_a_bad_row_is_not_retryable(loaded: LoadedModel) -> None:
    (answer,) = make_engine(loaded).stream([replace(request(), prompts=())])
    assert (answer.is_retryable, answer.error) == (
        False,
        "a request has one prompt, for now",
    )

"""Stock transformers, as answers are compared with it: its own rules, and no others."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from gc2ray.models.hf_reference import StockModel, StockSettings
from tests.support.model_files import copy_of, rewrite
from tests.support.rows import SIZES, picture

UNHEARD: list[dict[str, Any]] = [
    {"num_return_sequences": 2, "do_sample": True},
    {"max_time": 1e-9},
    {"prompt_lookup_num_tokens": 3},
    {"is_assistant": True, "num_assistant_tokens": 3, "assistant_confidence_threshold": 0.5},
    {"cache_implementation": "offloaded"},
    {"return_dict_in_generate": False, "output_scores": True, "use_cache": False, "max_length": 3,
     "renormalize_logits": True, "early_stopping": True, "length_penalty": 2.0, "top_k": 3,
     "decoder_start_token_id": 5, "epsilon_cutoff": 0.1, "pad_token_id": 7, "max_new_tokens": 1},
]  # fmt: skip
"""Settings of a generation config that change no answer of ours."""


@pytest.mark.parametrize("unheard", UNHEARD, ids=lambda unheard: next(iter(unheard)))
def test_settings_that_we_ignore_do_not_change_stock(
    tiny_paths: dict[str, Path], tmp_path: Path, unheard: dict[str, Any]
) -> None:
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    image, settings = picture(SIZES[0]), StockSettings("float32", "cpu", max_new_tokens=4)
    with StockModel(model, settings) as stock:
        wanted = stock.answer([image], "What is it?")
    rewrite(model / "generation_config.json", **unheard)
    with StockModel(model, settings) as stock:
        found = stock.answer([image], "What is it?")
    assert (found.token_ids, found.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    torch.testing.assert_close(found.logits, wanted.logits)


def test_stock_follows_the_models_own_rules(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    """All but those that answers do not follow."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    settings = StockSettings("float32", "cpu", max_new_tokens=4)

    def first_token(settings: StockSettings) -> int:
        with StockModel(model, settings) as stock:
            return stock.answer([picture(SIZES[0])], "What is it?").token_ids[0]

    wanted = first_token(settings)
    rewrite(model / "generation_config.json", suppress_tokens=[wanted])
    assert first_token(settings) != wanted
    assert first_token(replace(settings, ignored=("suppress_tokens",))) == wanted


def test_stock_is_loaded_silently(
    tiny_paths: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a model that is not whole ours says it in a line."""
    model = copy_of(tiny_paths["vicuna"], tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["image_newline"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    logged: list[str] = []
    heard = logging.Handler()
    monkeypatch.setattr(heard, "emit", lambda record: logged.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [heard])
    enable_progress_bar()  # another test may have put it out
    with StockModel(model, StockSettings("float32", "cpu", max_new_tokens=4)):
        assert is_progress_bar_enabled(), "as it was"
    message = capfd.readouterr()
    assert "LOAD REPORT" not in message.err + message.out + "".join(logged)
    assert "Loading weights" not in message.err + message.out

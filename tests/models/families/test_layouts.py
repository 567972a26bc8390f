"""Checkpoints in the files that the hub had of each family, whole and broken."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from gc2ray.core.config.job import Cluster
from gc2ray.core.records import ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.hf_reference import StockModel, StockSettings
from tests.support.families import FAMILIES
from tests.support.old_layouts import LAYOUTS
from tests.support.rows import encoded, make_recipe

NEW_TOKENS = 8
TOLERANCE = 1e-5
IMAGE = Image.fromarray(
    np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
).resize((165, 120))
QUESTION = "What is it?"
WITHOUT_HEAD = ("granite-vision, tied inside", "idefics3, tied inside")
"""Of these transformers 5 takes a random head, if it is not told otherwise."""


@cache
def load(path: Path) -> LoadedModel:
    return loading.load(str(path), revision=None, dtype="float32", device="cpu")


@cache
def answered(loaded: LoadedModel) -> tuple[Tensor, tuple[int, ...]]:
    """Logits behind the image, uncompressed, and the greedy answer."""
    recipe = make_recipe(
        "unused", compression__retention=1.0, generation__max_new_tokens=NEW_TOKENS
    )
    engine = Engine(loaded, recipe, Cluster(views_per_batch=60))
    row = Request("row", "test", 0, (ImageRef(encoded(IMAGE)),), (QUESTION,))
    (prompt,) = engine.prompts([row])
    (answer,) = engine.stream([row])
    assert answer.error is None
    logits: Tensor = loaded.model(inputs_embeds=prompt.embeds[None]).logits[0]
    return logits[prompt.visual[0][1] :], answer.token_ids


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_an_old_layout_is_the_same_model(
    today: Any, old: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    layout = LAYOUTS[name]
    expected = load(today(layout.family, tied=layout.tied))
    with caplog.at_level(logging.WARNING, "gc2ray"):
        found = load.__wrapped__(old(name))
    assert [record for record in caplog.records if record.name.startswith("gc2ray")] == []
    assert found.end_tokens == expected.end_tokens
    assert found.model.config.tie_word_embeddings is layout.tied
    weights, same = found.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in same)
    (logits, tokens), (same_logits, same_tokens) = answered(found), answered(expected)
    torch.testing.assert_close(logits, same_logits, rtol=0, atol=TOLERANCE)
    assert tokens == same_tokens


@pytest.mark.parametrize("name", LAYOUTS)
@torch.inference_mode()
def test_stock_answers_an_old_layout_alike(old: Any, name: str) -> None:
    """Its model and its processor, each from the old files."""
    changes = {"tie_word_embeddings": True} if name in WITHOUT_HEAD else {}
    model = AutoModelForImageTextToText.from_pretrained(old(name), dtype="float32", **changes)
    loaded = load(old(name))
    text = ChatPrompt(loaded.processor).render(QUESTION)
    bos = loaded.processor.tokenizer.bos_token
    inputs = FAMILIES[LAYOUTS[name].family].stock(old(name))(
        images=[[IMAGE]], text=[text], return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )  # fmt: skip
    logits, tokens = answered(loaded)
    stock = model(**inputs).logits[0, -len(logits) :]
    torch.testing.assert_close(logits, stock, rtol=0, atol=TOLERANCE)
    written = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert tuple(written[0, inputs["input_ids"].shape[1] :].tolist())[: len(tokens)] == tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_has_stock_answer_an_old_layout(old: Any, name: str) -> None:
    """With the same head, wherever the files say that it is tied."""
    loaded = load(old(name))
    with StockModel(old(name), StockSettings("float32", "cpu", NEW_TOKENS)) as stock:
        assert stock.answer([IMAGE], QUESTION).token_ids == answered(loaded)[1]

"""Checkpoints in the files that the hub had of each family in 2024 and 2025."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
from tests.support.model_files import (
    CONFIG,
    GENERATION,
    PROCESSOR,
    TEXT,
    TOKENIZER,
    VISION,
    Change,
    all_of,
    copy_of,
    edited,
    without,
)
from tests.support.old_layouts import LAYOUTS, WEIGHTS
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


# --- what other copies of them have, or lack ------------------------------------------------------

IMAGES = "preprocessor_config.json"


def template_in_processor(model: Path) -> None:
    """As transformers 4.43 wrote it."""
    (file,) = model.glob("chat_template.*")
    text = file.read_text()
    file.unlink()
    text = json.loads(text)["chat_template"] if file.suffix == ".json" else text
    edited(PROCESSOR, chat_template=text)(model)


def fast_images(model: Path) -> None:
    """As transformers 4.5x wrote it, where torchvision was installed."""
    images = json.loads((model / IMAGES).read_text())
    kind = f"{images['image_processor_type'].removesuffix('Fast')}Fast"
    names = ("crop_size", "device", "disable_grouping", "input_data_format", "return_tensors")
    written = {**dict.fromkeys(names), **images, "image_processor_type": kind}
    (model / IMAGES).write_text(json.dumps(written))


def slow_images(model: Path) -> None:
    kind = json.loads((model / IMAGES).read_text())["image_processor_type"]
    edited(IMAGES, image_processor_type=kind.removesuffix("Fast"))(model)


def old_buffers(model: Path) -> None:
    found = load_file(model / WEIGHTS)
    layer = next(name for name in found if name.endswith("layers.0.self_attn.q_proj.weight"))
    buffer = layer.replace("q_proj.weight", "rotary_emb.inv_freq")
    save_file(found | {buffer: torch.rand(6)}, model / WEIGHTS, {"format": "pt"})


MORE = all_of(
    template_in_processor,
    fast_images,
    old_buffers,
    edited(CONFIG, _attn_implementation="flash_attention_2"),
    edited(*TEXT, _flash_attn_2_enabled=True, use_cache=False),
)
LESS = all_of(
    without(PROCESSOR, GENERATION),
    slow_images,
    edited(*TEXT, eos_token_id=None, architectures=None, torch_dtype=None),
    edited(TOKENIZER, chat_template=None, tokenizer_class="PreTrainedTokenizerFast"),
)
DEFAULTS = dict.fromkeys((
    "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy",
))  # fmt: skip
OTHERS: dict[str, tuple[str, Change]] = {
    "more in Granite's": ("granite-vision, trained", MORE),
    "less in Granite's": ("granite-vision, trained", LESS),
    "more in OneVision's": (
        "onevision, trained", all_of(MORE, edited(PROCESSOR, vision_aspect_ratio="anyres_max_4")),
    ),
    "less in OneVision's": ("onevision, trained", all_of(LESS, edited(CONFIG, **DEFAULTS))),
    "more in InternVL's": ("internvl3, trained", all_of(MORE, edited(IMAGES, max_patches=12))),
    "less in InternVL's": (
        "internvl3, trained",
        all_of(
            LESS,
            edited(CONFIG, image_seq_length=None, downsample_ratio=None, **DEFAULTS),
            edited(*VISION, image_size=56, patch_size=7),
        ),
    ),
    "more in SmolVLM's": ("smolvlm2 500M 2025", MORE),
    "less in SmolVLM's": ("smolvlm2 500M 2025", LESS),
    "SmolVLM with Idefics3's processor": (
        "smolvlm2 500M 2025",
        all_of(
            edited(IMAGES, image_processor_type="Idefics3ImageProcessor"),
            edited(PROCESSOR, processor_class="Idefics3Processor"),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
@torch.inference_mode()
def test_other_copies_answer_alike(old: Any, tmp_path: Path, case: str) -> None:
    name, change = OTHERS[case]
    copy = copy_of(old(name), tmp_path / "model")
    change(copy)
    found, expected = load.__wrapped__(copy), load(old(name))
    assert found.end_tokens == expected.end_tokens
    (logits, tokens), (same_logits, same_tokens) = answered(found), answered(expected)
    assert torch.equal(logits, same_logits)
    assert tokens == same_tokens


@pytest.mark.parametrize("name", ["onevision 7B 2024", "idefics3 8B 2024"])
def test_code_beside_a_known_type_is_not_run(
    old: Any, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copy_of(old(name), tmp_path / "model")
    edited(CONFIG, auto_map={"AutoModel": "modeling_own.OwnModel"})(copy)
    (copy / "modeling_own.py").write_text("raise SystemExit('run')")
    with caplog.at_level(logging.WARNING, "gc2ray"):
        load.__wrapped__(copy)
    (message,) = caplog.messages
    assert (
        f"{copy}: its config.json names code of its own (auto_map), which is never run" in message
    )

"""Which language models are computed here, that they are stock's, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GptOssConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3MoeConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from gc2ray.engine.decoding.forced import ForcedDecoder, largest_difference
from gc2ray.engine.decoding.kv_cache import KvCache
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention import Chunk, Step
from gc2ray.models.layers.attention_backends import attend_by_row
from gc2ray.models.llama import LanguageModel, unsupported
from tests.support.continuous_batching import (
    KINDS,
    VOCABULARY,
    decode,
    make_config,
    make_model,
    one_by_one,
    ragged,
    randomised,
    tokens,
)

TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
CLIP = CLIPVisionConfig(**TOWER, projection_dim=16)
FAMILIES: dict[str, tuple[Any, Any, Any, str]] = {
    "llava-next-llama": (LlavaNextConfig, LlavaNextForConditionalGeneration, CLIP, "llama"),
    "llava-next-granite": (LlavaNextConfig, LlavaNextForConditionalGeneration, CLIP, "granite"),
    "onevision-qwen2": (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        {**TOWER, "model_type": "siglip_vision_model"},
        "qwen2",
    ),
    "internvl-qwen3": (
        InternVLConfig,
        InternVLForConditionalGeneration,
        {**TOWER, "image_size": (28, 28), "patch_size": (14, 14)},
        "qwen3",
    ),
    "idefics3-llama": (Idefics3Config, Idefics3ForConditionalGeneration, TOWER, "llama"),
    "smolvlm-llama": (SmolVLMConfig, SmolVLMForConditionalGeneration, TOWER, "llama"),
}
"""Models of images and text, with the kind of language model inside."""


def in_family(name: str, text: Any = None) -> Any:
    config_class, model_class, tower, kind = FAMILIES[name]
    made = config_class(
        vision_config=tower,
        text_config=make_config(kind) if text is None else text,
        image_token_id=VOCABULARY - 1,
        tie_word_embeddings=False,
    )
    return randomised(model_class, made)


@pytest.fixture(scope="module")
def every_model() -> dict[str, Any]:
    """Language models by themselves, and within models of images and text."""
    return {kind: make_model(kind) for kind in KINDS} | {name: in_family(name) for name in FAMILIES}


@torch.inference_mode()
def compared(model: Any, stock: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our and stock's logits after a prompt of 60 tokens and after each of four more."""
    ids = torch.randint(VOCABULARY - 1, (64,), generator=torch.Generator().manual_seed(2))
    prompt = Prompt(model.get_input_embeddings()(ids[:60]))
    wanted = stock(inputs_embeds=stock.get_input_embeddings()(ids)[None]).logits[0, 59:]
    return ForcedDecoder(model).logits(prompt, ids[60:].tolist()), wanted


@pytest.mark.parametrize("name", [*KINDS, *FAMILIES])
def test_logits_are_those_of_stock(every_model: dict[str, Any], name: str) -> None:
    model = every_model[name]
    ours, stock = compared(model, model)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert stock.std(dim=1).min() > 0.1, "logits alike: nothing could fail"


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "llava-next-granite"])
def test_logits_in_half_precision_are_as_near_as_those_of_stock(name: str) -> None:
    """Both against stock's in float32 with the same weights, rounded."""
    build = in_family if name in FAMILIES else make_model
    half = build(name).to(torch.bfloat16)
    rounded = build(name).to(torch.bfloat16).float()
    ours, exact = compared(half, rounded)
    _, stock = compared(half, half)
    assert 0 < largest_difference(ours, exact)[0] < 2 * largest_difference(stock, exact)[0] < 0.2


def test_dynamic_positions_are_those_of_stock() -> None:
    """Up to the model's last position, also once transformers has stretched its own."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    text = make_config("qwen2")
    text.rope_parameters, text.max_position_embeddings = rope, 64
    model = in_family("internvl-qwen3", text)
    assert unsupported(model) is None
    ours, stock = compared(model, model)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    language = LanguageModel(model)
    before = language._rotary(stock, torch.arange(64)[None])
    with torch.inference_mode():
        model.model.language_model.rotary_emb(stock, torch.arange(90)[None])
        theirs = model.model.language_model.rotary_emb(stock, torch.arange(80)[None])
    assert not torch.equal(theirs[0][:, :64], before[0])
    for ours, old in zip(language._rotary(stock, torch.arange(64)[None]), before, strict=True):
        assert torch.equal(ours, old)


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_images_and_text_answer_as_generate(
    every_model: dict[str, Any], name: str
) -> None:
    model = every_model[name]
    requests = ragged(model, 12)
    assert tokens(decode(model, requests)) == one_by_one(model, requests)


@torch.inference_mode()
def test_the_callers_embeddings_stay_as_they_are(every_model: dict[str, Any]) -> None:
    """A step that ran out of memory is repeated with them."""
    model, prompt = LanguageModel(every_model["granite"]), torch.arange(9)
    kv_cache = KvCache(model.kv_shape, 20, dtype=model.dtype, device=model.device)
    step, embeds = Step.from_chunks([Chunk(0, 9, 9)], kv_cache.states), model.embed(prompt)
    model.logits(embeds, prompt, step, attend_by_row)
    assert embeds.equal(model.embed(prompt))


def test_unsupported_models_are_recognised(
    every_model: dict[str, Any], loaded_models: dict[str, LoadedModel]
) -> None:
    assert all(unsupported(model) is None for model in every_model.values())
    assert all(unsupported(loaded.model) is None for loaded in loaded_models.values())
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
        "original_max_position_embeddings": 1024, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, rope_parameters=rope,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert "longrope" in (unsupported(model) or "")
    with pytest.raises(ValueError, match="longrope"):
        LanguageModel(model)
    assert "Linear" in (unsupported(nn.Linear(2, 2)) or "")


@pytest.mark.parametrize(
    ("config_class", "kind"), [(Qwen3MoeConfig, "qwen3_moe"), (GptOssConfig, "gpt_oss")]
)
def test_experts_are_refused_by_name(config_class: Any, kind: str) -> None:
    """The other language models of InternVL 3.5."""
    text = config_class(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"the language model is {kind}; supported: llama"):
        LanguageModel(in_family("internvl-qwen3", text))

"""What benchmarks are made of: counts of operations, and models of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from gc2ray.families.tiny import TinySpec, untrained
from jobs.benchmarks.flops import FLOAT32, LLAVA_7B, TextModel, Tower, causal_pairs

TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager",
}  # fmt: skip


def counted(work: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def test_operations_of_a_language_model_are_those_that_torch_counts() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    text, length = TextModel.of(model.config), 11
    ids = torch.arange(length)[None]
    output = model(ids)
    square = 4 * text.queries * text.layers * (length**2 - causal_pairs(length))
    prefill = counted(lambda: model(ids, logits_to_keep=1))
    assert prefill == text.prefill(length) + square
    cache = output.past_key_values
    step = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert step == text.decode(length, 2)
    second = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert step + second == text.decode(length, 3)


def test_a_prompt_needs_only_keys_and_values_of_the_last_layer() -> None:
    text, length = TextModel(2, width=8, queries=8, keys=4, ffn=16, vocabulary=10), 5
    layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
    assert text.layer_weights == layer
    first = 2 * layer * length + 4 * 8 * 15
    last = 2 * 2 * 8 * 4 * length + 2 * (layer - 2 * 8 * 4) + 4 * 8 * 5
    assert text.needed_prefill(length) == first + last + 2 * 8 * 10
    assert text.needed_prefill(1) == text.prefill(1)
    assert text.weight_bytes == FLOAT32 * (2 * layer + 80)
    assert text.decode(length, 1) == text.cache_bytes_read(length, 1) == 0
    assert text.cache_bytes_read(length, 3) == FLOAT32 * 2 * 2 * 4 * (6 + 7)


def test_operations_of_a_tower_are_those_that_torch_counts() -> None:
    model, _ = untrained(TinySpec(vision=(32, 3, 4)))
    tower = Tower.of(model.config)
    assert (tower.layers, tower.needed_layers, tower.patches) == (3, 2, 36)
    config: Any = CLIPVisionConfig(**model.config.vision_config.to_dict())
    config._attn_implementation = "eager"
    clip = CLIPVisionModel(config).eval()
    pixels = torch.zeros(2, 3, 84, 84)
    assert counted(lambda: clip(pixels)) == tower.whole(2)
    layer = 2 * (37 * (4 * 32**2 + 2 * 32 * 64) + 2 * 32 * 37**2)
    assert tower.whole(1) - tower.needed(1) == layer
    projector = model.model.multi_modal_projector
    assert counted(lambda: projector(torch.zeros(7, 32))) == tower.projector(7)
    several, _ = untrained(TinySpec(vision_layers=(-3, -1)))
    with pytest.raises(ValueError, match="several"):
        Tower.of(several.config)


def test_a_7b_costs_what_is_known_of_it() -> None:
    """CLIP ViT-L/14-336 has 381.9 GFLOP a view; reading 2940 tokens takes Vicuna-7B 40.3 TFLOP."""
    tower, text = LLAVA_7B
    assert tower.whole(1) == pytest.approx(381.9e9, rel=1e-3)
    assert tower.needed(1) == pytest.approx(366.0e9, rel=1e-3)
    assert tower.projector(2880) == pytest.approx(0.121e12, rel=1e-2)
    assert text.prefill(2940) == pytest.approx(40.3e12, rel=1e-2)


def test_sizes_of_a_tiny_model_can_be_set() -> None:
    usual = untrained(TinySpec())[0].state_dict()
    spelled = untrained(TinySpec(vision_ffn=64, text_ffn=96, table=1))[0].state_dict()
    assert usual.keys() == spelled.keys()
    assert all(usual[name].equal(spelled[name]) for name in usual)
    model, _ = untrained(TinySpec(vision_ffn=40, text_ffn=56, table=1000))
    text, tower = TextModel.of(model.config.text_config), Tower.of(model.config)
    assert (text.vocabulary, text.ffn, tower.ffn) == (1000, 56, 40)
    assert model.get_output_embeddings().weight.shape == (1000, 48)

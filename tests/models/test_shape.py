"""What is counted is what torch counts, what the paper printed, and adds up."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from gc2ray.core.stats import STAGES
from gc2ray.engine.decoding.kv_cache import KvCache
from gc2ray.models.families.tiny import TinySpec, untrained
from gc2ray.models.flops import AnswerTokens, ExecutionMode, matmul_flops, paper_flops
from gc2ray.models.layers.attention import Chunk, Step
from gc2ray.models.llama import LanguageModel
from gc2ray.models.shape import LLAVA_7B, ModelShape, TextModel, Tower, cached_reads, causal_pairs
from jobs.benchmarks import full_size

VICUNA_13B = replace(
    LLAVA_7B.text, layers=40, width=5120, queries=5120, keys=5120, ffn=13_824, heads=40
)
FP16 = 2
TOKENS = (2880, 2160, 1440, 720, 288)
TEXT: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager",
}  # fmt: skip


def counted(work: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


# ------------------------------------------------------------------------------- the paper's table


def paper_display(kv_bytes: int) -> float:
    """MB as the table prints them: decimal units cut to so many digits, "G" taken as 1024 "M"."""
    if kv_bytes > 1e9:
        return float(f"{kv_bytes / 1e9:.1f}") * 1024
    return float(f"{kv_bytes / 1e6:.0f}")


@pytest.mark.parametrize(
    ("text", "tflops"),
    [
        (LLAVA_7B.text, (41.7, 30.4, 19.7, 9.6, 3.8)),
        (VICUNA_13B, (80.0, 58.7, 38.3, 18.7, 7.4)),
    ],
    ids=["7b", "13b"],
)
def test_operations_are_those_of_table_8(text: TextModel, tflops: tuple[float, ...]) -> None:
    """arXiv 2501.05179, table 8 (LLaVA-NeXT-7B) and 9 (13B)."""
    for tokens, expected in zip(TOKENS, tflops, strict=True):
        assert paper_flops(text, tokens) / 1e12 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("text", "megabytes"),
    [
        (LLAVA_7B.text, (1536.0, 1126.4, 755.0, 377.0, 151.0)),
        (VICUNA_13B, (2457.6, 1843.2, 1228.8, 590.0, 236.0)),
    ],
    ids=["7b", "13b"],
)
def test_kv_caches_are_those_of_table_8(text: TextModel, megabytes: tuple[float, ...]) -> None:
    shape = replace(LLAVA_7B, text=text)
    for tokens, expected in zip(TOKENS, megabytes, strict=True):
        shown = paper_display(tokens * shape.kv_bytes_per_token)
        assert shown == pytest.approx(expected, rel=0.01)


def test_the_paper_counts_more_than_the_products() -> None:
    """Softmax, norms and activations are in one, and half the square of attention in the other."""
    text = LLAVA_7B.text
    answer = AnswerTokens(views=0, projected=0, prompt=2880, output=1)
    products = matmul_flops(LLAVA_7B, answer, ExecutionMode.EAGER)["prefill"]
    assert products < paper_flops(text, 2880) < 1.01 * products
    assert matmul_flops(LLAVA_7B, answer)["prefill"] < 0.95 * products


# ---------------------------------------------------------------------------------- what torch says


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT)),
    "one key head": lambda: LlamaForCausalLM(LlamaConfig(**TEXT | {"num_key_value_heads": 1})),
    "as many as queries": lambda: LlamaForCausalLM(
        LlamaConfig(**TEXT | {"num_key_value_heads": 4})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=16)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**TEXT, residual_multiplier=0.5)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_operations_of_a_language_model_are_those_that_torch_counts(make: Any) -> None:
    model = make().eval()
    text, length = TextModel.from_config(model.config), 11
    ids = torch.arange(length)[None]
    output = model(ids)
    assert counted(lambda: model(ids, logits_to_keep=1)) == text.eager_prefill(length)
    cache = output.past_key_values
    step = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert step == text.decode(length, 2)
    second = counted(lambda: model(ids[:, :1], past_key_values=cache))
    assert step + second == text.decode(length, 3)


def test_operations_of_a_tower_are_those_that_torch_counts() -> None:
    model, _ = untrained(TinySpec(vision=(32, 3, 4)))
    tower = Tower.from_config(model.config)
    assert (tower.layers, tower.run_layers, tower.patches) == (3, 2, 36)
    config: Any = CLIPVisionConfig(**model.config.vision_config.to_dict())
    config._attn_implementation = "eager"
    clip = CLIPVisionModel(config).eval()
    pixels = torch.zeros(2, 3, 84, 84)
    assert counted(lambda: clip(pixels)) == tower.whole(2)
    layer = 2 * (37 * (4 * 32**2 + 2 * 32 * 64) + 2 * 32 * 37**2)
    assert tower.whole(1) - tower.needed(1) == layer
    projector = model.model.multi_modal_projector
    assert counted(lambda: projector(torch.zeros(7, 32))) == tower.projector(7)


def siglip(tower: SiglipVisionConfig) -> ModelShape:
    text = LlamaConfig(**TEXT)
    return ModelShape.from_config(LlavaNextConfig(vision_config=tower, text_config=text), FP16)


def test_operations_of_a_tower_without_class_token_are_those_that_torch_counts() -> None:
    config: Any = SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        image_size=56, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    tower = siglip(config).tower
    config._attn_implementation = "eager"
    model = SiglipVisionModel(config).eval()
    assert not tower.class_token
    assert counted(lambda: model(torch.zeros(2, 3, 56, 56))) == tower.whole(2)


def small(text: Any = None, **changes: Any) -> Any:
    """A whole LLaVA-NeXT with eager attention, its image in five views."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        image_size=56, patch_size=14, projection_dim=24,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text or LlamaConfig(**TEXT),
        image_grid_pinpoints=[[112, 112]], image_token_id=49, **changes,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    return model


def test_operations_of_a_whole_model_are_those_that_torch_counts() -> None:
    """Stock transformers, from pixels to the first new token, within 0.1 % as the issue asks."""
    model = small()
    image = 16 + 64 + 8  # thumbnail, four crops, newlines
    ids = torch.cat([torch.full((1, image), 49), torch.arange(6)[None]], dim=1)
    pixels, size = torch.zeros(1, 5, 3, 56, 56), torch.tensor([[112, 112]])
    found = counted(
        lambda: model(input_ids=ids, pixel_values=pixels, image_sizes=size, logits_to_keep=1)
    )
    answer = AnswerTokens(views=5, projected=80, prompt=image + 6, output=1)
    stages = matmul_flops(ModelShape.from_config(model.config, FP16), answer, ExecutionMode.EAGER)
    assert sum(stages.values()) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("layers", [-2, -1, [-1, -2], [-3, -2]])
def test_features_of_several_layers_are_counted(layers: Any) -> None:
    model = small(vision_feature_layer=layers)
    tower = Tower.from_config(model.config)
    assert tower.run_layers == (3 if layers in (-1, [-1, -2]) else 2)
    states = torch.zeros(5, 24 * tower.features)
    projector = model.model.multi_modal_projector
    assert counted(lambda: projector(states)) == tower.projector(5)


class CountingAttention:
    """Attends to nothing, and counts the products that attention would have."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(
        self, step: Step, layer: int, queries: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        ends = step.query_ends.tolist()
        for used, first, stop in zip(step.used.tolist(), ends, ends[1:], strict=False):
            seen = sum(range(used - (stop - first) + 1, used + 1))
            self.flops += 4 * seen * queries[0].numel()
        return torch.zeros_like(queries)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_operations_of_our_language_model_are_those_that_torch_counts(make: Any) -> None:
    """With float64 nothing is prepacked, and every product is one that torch sees."""
    model = make().eval().double()
    ours, text, length, new = LanguageModel(model), TextModel.from_config(model.config), 11, 4
    kv_states = KvCache(ours.kv_shape, 20, dtype=ours.dtype, device=ours.device).states

    def run(first: int, stop: int) -> int:
        step = Step.from_chunks([Chunk(0, stop, stop - first)], kv_states)
        hidden, attend = ours.embed(torch.arange(first, stop)), CountingAttention()
        flops = counted(lambda: ours.logits(hidden, torch.arange(first, stop), step, attend))
        return flops + attend.flops

    assert run(0, length) == text.needed_prefill(length)
    assert run(5, length) == text.needed_prefill(length, shared=5)
    steps = [run(at, at + 1) for at in range(length, length + new - 1)]
    assert sum(steps) == text.decode(length, new)


# ----------------------------------------------------------------------------- weights and memory


@pytest.mark.parametrize("name", [*full_size.SIZES])
def test_all_weights_are_counted(name: str) -> None:
    model, _ = untrained(full_size.SIZES[name], device=torch.device("meta"))
    shape = ModelShape.from_config(model.config, FP16)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.needs().weights == FP16 * shape.parameters


@pytest.mark.parametrize(("name", "billions"), [("llava-next-7b", 7.06), ("llava-next-13b", 13.35)])
def test_full_sizes_are_the_published_ones(name: str, billions: float) -> None:
    """Parameters of LLaVA-NeXT with Vicuna-7B and 13B, without making them."""
    model, _ = untrained(full_size.SIZES[name], device=torch.device("meta"))
    assert ModelShape.from_config(model.config, FP16).parameters / 1e9 == pytest.approx(
        billions, abs=0.02
    )


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**TEXT)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, head_dim=16)),
        (MistralForCausalLM, MistralConfig(**TEXT)),
        (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
        (LlamaForCausalLM, LlamaConfig(**TEXT, attention_bias=True, mlp_bias=True)),
        (Qwen3ForCausalLM, Qwen3Config(**TEXT, head_dim=16)),
        (Qwen3ForCausalLM, Qwen3Config(**TEXT, attention_bias=True, tie_word_embeddings=True)),
        (GraniteForCausalLM, GraniteConfig(**TEXT, tie_word_embeddings=True)),
        (GraniteForCausalLM, GraniteConfig(**TEXT, attention_bias=True, mlp_bias=True)),
    ],
    ids=[
        "llama", "tied", "wide heads", "mistral", "qwen2", "biased llama", "qwen3", "biased qwen3",
        "granite", "biased granite",
    ],
)  # fmt: skip
def test_all_weights_of_language_models_are_counted(make: Any, config: Any) -> None:
    model = make(config)
    text = TextModel.from_config(model.config)
    assert text.parameters == sum(parameter.numel() for parameter in model.parameters())
    cache = model(torch.arange(7)[None]).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert 7 * text.cached_numbers == numbers


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("outside", [True, False])
def test_the_outermost_config_says_whether_the_text_table_is_tied(
    *, outside: bool, inside: bool
) -> None:
    text = GraniteConfig(**TEXT, tie_word_embeddings=inside)
    model = small(text, tie_word_embeddings=outside)
    shape = ModelShape.from_config(model.config, FP16)
    assert shape.text.tied is outside
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_all_weights_of_towers_are_counted() -> None:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        image_size=56, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    tower = siglip(config).tower
    model = SiglipVisionModel(config)
    behind = tower.projector(1) // 2 + 3 * tower.text_width  # projector and newline
    assert tower.parameters - behind == sum(p.numel() for p in model.parameters())


def test_a_7b_has_the_published_costs() -> None:
    """CLIP ViT-L/14-336 has 381.9 GFLOP a view; reading 2940 tokens takes Vicuna-7B 40.3 TFLOP."""
    tower, text = LLAVA_7B.tower, LLAVA_7B.text
    assert tower.whole(1) == pytest.approx(381.9e9, rel=1e-3)
    assert tower.needed(1) == pytest.approx(366.0e9, rel=1e-3)
    assert tower.projector(2880) == pytest.approx(0.121e12, rel=1e-2)
    assert text.prefill(2940) == pytest.approx(40.3e12, rel=1e-2)
    needs = LLAVA_7B.needs()
    assert needs.kv_per_token == 524_288
    assert needs.weights == pytest.approx(14.1e9, rel=0.01)


def test_features_that_are_projected_first_are_as_wide_as_the_text() -> None:
    first = replace(LLAVA_7B, tower=replace(LLAVA_7B.tower, projects_all=True))
    assert LLAVA_7B.needs().features_per_view == FP16 * 576 * 1024
    assert first.needs().features_per_view == FP16 * 576 * 4096


def test_the_built_in_shape_of_the_7b_is_the_models() -> None:
    model, _ = untrained(full_size.VICUNA_7B, device=torch.device("meta"))
    found = ModelShape.from_config(model.config, FP16)
    positions = found.text.max_positions
    assert replace(found, text=replace(found.text, max_positions=4096)) == LLAVA_7B
    assert positions == model.config.text_config.max_position_embeddings


def test_a_shape_survives_its_json() -> None:
    assert ModelShape.from_dict(json.loads(json.dumps(LLAVA_7B.to_dict()))) == LLAVA_7B


# ------------------------------------------------------------------------------------- properties


def test_a_prompt_needs_only_keys_and_values_of_the_last_layer() -> None:
    text, length = TextModel(2, width=8, queries=8, keys=4, ffn=16, vocabulary=10), 5
    layer = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
    assert text.layer_weights == layer
    first = 2 * layer * length + 4 * 8 * 15
    last = 2 * 2 * 8 * 4 * length + 2 * (layer - 2 * 8 * 4) + 4 * 8 * 5
    assert text.needed_prefill(length) == first + last + 2 * 8 * 10
    assert text.needed_prefill(1) == text.prefill(1)
    assert text.step_weights == 2 * layer + 80
    assert text.decode(length, 1) == cached_reads(length, 1) == 0
    assert text.cached_numbers * cached_reads(length, 3) == 2 * 2 * 4 * (6 + 7)


answers = st.builds(
    AnswerTokens,
    views=st.integers(0, 9),
    projected=st.integers(0, 3000),
    prompt=st.integers(2, 4000),
    output=st.integers(0, 300),
)


@given(answers, st.sampled_from(["views", "projected", "prompt", "output"]), st.integers(1, 500))
def test_more_tokens_never_cost_less(answer: AnswerTokens, name: str, more: int) -> None:
    larger = replace(answer, **{name: getattr(answer, name) + more})
    before, after = matmul_flops(LLAVA_7B, answer), matmul_flops(LLAVA_7B, larger)
    assert all(after[stage] >= before[stage] for stage in before)
    assert sum(after.values()) > sum(before.values()) or name == "output"
    if name == "prompt":
        assert paper_flops(LLAVA_7B.text, larger.prompt) > paper_flops(LLAVA_7B.text, answer.prompt)


@given(answers)
def test_gc2ray_never_does_more_than_eager_transformers(answer: AnswerTokens) -> None:
    ours, eager = (
        matmul_flops(LLAVA_7B, answer, run) for run in (ExecutionMode.GC2RAY, ExecutionMode.EAGER)
    )
    assert ours.keys() == eager.keys() == {*STAGES} - {"image"}
    assert all(ours[stage] <= eager[stage] for stage in ours)


@given(st.integers(2, 3000), st.data())
def test_a_shared_prefix_is_not_counted_again(length: int, data: Any) -> None:
    """A prefix and the rest behind it are the products of the whole, but for one more logit."""
    text, shared = LLAVA_7B.text, data.draw(st.integers(1, length - 1))
    logits = 2 * text.head_weights
    assert text.prefill(shared) - logits + text.prefill(length, shared) == text.prefill(length)
    assert text.needed_prefill(length, shared) <= text.needed_prefill(length)


@given(st.integers(0, 3000), st.integers(1, 200), st.integers(1, 200))
def test_an_answer_costs_what_its_beginning_and_its_end_do(prompt: int, a: int, b: int) -> None:
    text = LLAVA_7B.text
    assert text.decode(prompt, a + b) == text.decode(prompt, a) + text.decode(prompt + a - 1, b + 1)


@given(st.integers(0, 500))
def test_pairs_are_counted_one_by_one(length: int) -> None:
    assert causal_pairs(length) == sum(range(1, length + 1))

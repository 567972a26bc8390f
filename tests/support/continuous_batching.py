"""Tiny language models, requests of many lengths, and what stock `generate` answers to them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.decoder import Completion
from gc2ray.engine.decoding.kv_cache import KvCache
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention import KvShape, Step
from gc2ray.models.layers.attention_backends import attend_by_row
from gc2ray.models.llama import LanguageModel

VOCABULARY, REQUESTS = 300, 64
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-gqa-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-window": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
        | {"head_dim": 24, "attention_bias": True},  # heads that no compiled attention takes
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        # With larger embeddings, or a tied table, answers repeat the prompt's last token.
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.6}
        | {"logits_scaling": 8.0},
    ),
}
PLENTY = DecodeLimits(20_000)
BURSTS = DecodeLimits(20_000, graph_steps=4)
ROOMS = {
    "one slot": DecodeLimits(20_000, live_rows=1),
    "five slots": DecodeLimits(20_000, live_rows=5),
    "few tokens": DecodeLimits(150),
    "small steps": DecodeLimits(20_000, prefill_tokens=1),
    "plenty": PLENTY,
}
Submitted = tuple[int, Prompt, GenerationConfig]


def make_model(kind: str) -> Any:
    _, model_class, _ = KINDS[kind]
    return randomised(model_class, make_config(kind))


def make_config(kind: str) -> Any:
    config_class, _, settings_ = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    spread = {"vocab_size": VOCABULARY, "initializer_range": 0.15}
    return config_class(**{**sizes, **heads, **spread, **settings_})


def randomised(model_class: Any, config: Any) -> Any:
    """A model whose biases and norms are random, too, and whose answers never end early."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ragged(model: Any, requests: int = REQUESTS, **changes: Any) -> list[Submitted]:
    """Prompts of 1 to 70 tokens, limits of 1 to 16."""
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    table = model.get_input_embeddings()
    made = []
    for tag in range(requests):
        ids = torch.randint(VOCABULARY, (rng.randint(1, 70),), generator=generator)
        sampling = GenerationConfig(max_new_tokens=rng.randint(1, 16), seed=1000 + tag)
        with torch.no_grad():
            made.append((tag, Prompt(table(ids)), sampling.model_copy(update=changes)))
    return made


def worded(model: Any, requests: int = REQUESTS, **changes: Any) -> list[Submitted]:
    """The same prompts, of which is known what their text was."""
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    made = []
    for tag, prompt, sampling in ragged(model, requests, **changes):
        ids = torch.randint(VOCABULARY, (rng.randint(1, 70),), generator=generator)
        rng.randint(1, 16)
        made.append((tag, replace(prompt, token_ids=tuple(ids.tolist())), sampling))
    return made


def run(decoder: ContinuousBatchDecoder, requests: Iterable[Submitted]) -> dict[int, Completion]:
    """Everything, by tag."""
    done: list[Completion] = []
    for request in requests:
        while not decoder.submit(*request):
            done += decoder.step()
    while len(decoder):
        done += decoder.step()
    assert decoder.step() == []
    assert len({item.tag for item in done}) == len(done)
    return {item.tag: item for item in done}


def decode(
    model: Any, requests: Sequence[Submitted], room: DecodeLimits = PLENTY, eos: Iterable[int] = ()
) -> dict[int, Completion]:
    return run(ContinuousBatchDecoder(LanguageModel(model), room, eos=eos), requests)


def tokens(done: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    assert [str(item.error) for item in done.values() if item.error] == []
    return {tag: done[tag].token_ids for tag in sorted(done)}


def one_by_one(model: Any, requests: Sequence[Submitted]) -> dict[int, tuple[int, ...]]:
    """Stock `generate`, a prompt at a time."""
    answers = {}
    for tag, prompt, sampling in requests:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        output = model.generate(
            inputs_embeds=prompt.embeds[None],
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
        )
        answers[tag] = tuple(output[0].tolist())
    return answers


class Expected:
    """Stock's answers by kind of model, made when they are asked for."""

    def __init__(self, models: dict[str, Any]) -> None:
        self._models = models
        self._found: dict[str, dict[int, tuple[int, ...]]] = {}

    def __getitem__(self, kind: str) -> dict[int, tuple[int, ...]]:
        if kind not in self._found:
            found = one_by_one(self._models[kind], ragged(self._models[kind]))
            assert len(set(found.values())) > REQUESTS - 5, "answers alike: nothing could fail"
            different = sum(len({*row}) for row in found.values())
            assert different > sum(map(len, found.values())) / 2, "tokens repeat"
            self._found[kind] = found
        return self._found[kind]


class Scarce:
    """Attention on a device whose memory is short: more than `rows` sequences do not fit."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.rows, self.error = rows, error
        self.most = 0
        self.poison: float | None = None

    def __call__(self, step: Step, layer: int, queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        if layer == 1:  # in the middle, when one layer's cache is written
            if len(step.chunks) > self.rows:
                raise self.error("no room")
            lengths = [chunk.length for chunk in step.chunks]
            if self.poison is not None and self.poison in lengths:
                raise self.error("this one breaks it")
            self.most = max(self.most, len(step.chunks))
        return attend_by_row(step, layer, queries, *rest)


def families_of(model: Any, per_group: Sequence[int]) -> list[Submitted]:
    """Groups of prompts that begin alike, group after group."""
    generator = torch.Generator().manual_seed(8)
    table = model.get_input_embeddings()
    made: list[Submitted] = []

    def embedded(length: int) -> torch.Tensor:
        return table(torch.randint(VOCABULARY, (length,), generator=generator)).detach()

    for group, members in enumerate(per_group):
        start = embedded(20 + 7 * group)
        for member in range(members):
            embeds = torch.cat([start, embedded(3 + member)])
            prompt = Prompt(
                embeds, ((2, len(start)),), prefix_key=f"image {group}", prefix_images=1
            )
            made.append((len(made), prompt, GenerationConfig(max_new_tokens=5 + member % 4)))
    return made


def alone(requests: Sequence[Submitted]) -> list[Submitted]:
    return [(tag, replace(p, prefix_key=None), sampling) for tag, p, sampling in requests]


KV_SHAPE = KvShape(layers=2, heads=3, head_size=4)


def make_pool(tokens_: int) -> KvCache:
    return KvCache(KV_SHAPE, tokens_, dtype=torch.float32, device=torch.device("cpu"))


def free_tokens(kv_cache: KvCache) -> int:
    return sum(len(slots) for slots in kv_cache._free)

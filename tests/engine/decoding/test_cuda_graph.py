"""Many steps at once, as GPUs replay them, without the GPU: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.cuda_graph import CudaGraphRunner, GraphRow, GraphShape
from gc2ray.engine.decoding.kv_cache import KvCache
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.layers.attention_backends import attend_padded
from gc2ray.models.llama import LanguageModel
from tests.support.continuous_batching import (
    BURSTS,
    KINDS,
    Expected,
    Scarce,
    alone,
    decode,
    families_of,
    ragged,
    run,
    tokens,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "room",
    [BURSTS, DecodeLimits(400, graph_steps=7), DecodeLimits(20_000, live_rows=3, graph_steps=16)],
)
def test_graph_replays_give_the_tokens_of_generate(
    models: dict[str, Any], expected: Expected, kind: str, room: DecodeLimits
) -> None:
    model = models[kind]
    decoder = ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend_padded)
    assert tokens(run(decoder, ragged(model))) == expected[kind]


def test_graph_replays_sample_as_single_steps(models: dict[str, Any]) -> None:
    model = models["llama"]
    mixed = [
        (
            tag,
            prompt,
            sampling.model_copy(update={"temperature": 1.3 * (tag % 3 > 0), "top_p": 0.9}),
        )
        for tag, prompt, sampling in ragged(model)
    ]
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=(), attend=attend_padded)
    assert tokens(run(decoder, mixed)) == tokens(decode(model, mixed))


def test_tokens_after_the_end_of_a_row_are_discarded(
    models: dict[str, Any], expected: Expected
) -> None:
    full = expected["llama"]
    eos = next(row for row in full.values() if len(row) > 6)[2]
    model = models["llama"]
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=[eos], attend=attend_padded)
    done = run(decoder, ragged(model))
    stepped = decode(model, ragged(model), eos=[eos])
    assert tokens(done) == tokens(stepped)
    assert {tag: item.finish_reason for tag, item in done.items()} == {
        tag: item.finish_reason for tag, item in stepped.items()
    }
    assert any(item.finish_reason == "stop" for item in done.values())


def test_graph_replays_share_prefixes_and_survive_too_little_memory(models: dict[str, Any]) -> None:
    class ScarcePadded(Scarce):
        def __call__(self, step: Any, layer: int, queries: torch.Tensor, *rest: Any) -> Any:
            if layer == 1 and len(step.used) > self.rows:
                raise self.error("no room")
            return attend_padded(step, layer, queries, *rest)

    model = models["llama"]
    requests = families_of(model, [6, 6])
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=(), attend=ScarcePadded(2))
    assert tokens(run(decoder, requests)) == tokens(decode(model, alone(requests)))
    assert decoder.oom_splits > 0


def test_graph_replays_read_no_values_between_steps(models: dict[str, Any]) -> None:
    """As many looks at values for one step as for eight: a graph could not hold any."""
    model = LanguageModel(models["llama"])
    kv_cache = KvCache(model.kv_shape, 600, dtype=torch.float32, device=torch.device("cpu"))
    rows = [
        GraphRow(5, 3, 10, 3, GenerationConfig(max_new_tokens=9)),
        GraphRow(6, 9, 100, 9, GenerationConfig(max_new_tokens=9, temperature=1.0), (0.3,) * 9),
    ]
    kv_cache.states.normal_()
    counts = []
    for steps in (1, 8):
        shape = GraphShape(3, 512, draws=True, penalises=True)
        burst = CudaGraphRunner(model, kv_cache.states, attend_padded, shape, 8)
        with torch.profiler.profile() as profile:
            burst.run(rows, steps)
        counts.append(sum(e.count for e in profile.key_averages() if "_local_scalar" in e.key))
    assert counts[0] == counts[1]


def test_missing_rows_of_a_graph_write_to_no_row(models: dict[str, Any]) -> None:
    model = LanguageModel(models["llama"])
    kv_cache = KvCache(model.kv_shape, 600, dtype=torch.float32, device=torch.device("cpu"))
    kv_cache.states.zero_()
    burst = CudaGraphRunner(
        model, kv_cache.states, attend_padded, GraphShape(4, 512, draws=False), 3
    )
    burst.run([GraphRow(5, 3, 10, 3, GenerationConfig(max_new_tokens=9))], 3)
    touched = kv_cache.states.abs().sum(dim=(0, 1, 2, 4)).nonzero().flatten().tolist()
    assert touched == [0, 13, 14, 15]


@pytest.mark.parametrize(
    ("asked", "made"), [(1, 1), (3, 4), (9, 12), (13, 16), (17, 24), (200, 256)]
)
def test_few_graph_shapes_are_recorded(asked: int, made: int) -> None:
    assert GraphShape.from_counts(asked, 1, draws=False) == GraphShape(made, 512, draws=False)
    assert GraphShape.from_counts(1, 513, draws=True) == GraphShape(1, 768, draws=True)

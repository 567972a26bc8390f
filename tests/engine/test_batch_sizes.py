"""How much at a time: what is set stays, the rest follows from model, memory and cores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gc2ray.core.config.input import MIB
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.engine.batch_sizes import derive_batch_sizes
from gc2ray.engine.device import Memory, cores, free_host_bytes
from gc2ray.engine.engine import _check_fits
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.shape import Needs
from tests.support.rows import make_recipe

GB = 10**9
SEVEN_B = Needs(
    weights=int(14.2 * GB),
    kv_per_token=524_288,
    per_token=2 * (12 * 4096 + 3 * 11008),
    per_view=2 * 577 * (8 * 1024 + 2 * 4096),
    features_per_view=2 * 576 * 1024,
    packed_per_view=3 * 2 * 576 * 4096,
    max_positions=4096,
)
H100 = Memory(is_gpu=True, total_bytes=80 * GB, cores=16)
HOST = Memory(is_gpu=False, total_bytes=16 * GB, cores=8)


def test_configured_sizes_are_used_unchanged() -> None:
    cluster = Cluster(
        image_threads=3, views_per_batch=7, kv_tokens=99, prefill_tokens=11, live_rows=2
    )
    for memory in (H100, HOST):
        found = derive_batch_sizes(cluster, SEVEN_B, memory)
        assert (found.image_threads, found.views_per_batch) == (3, 7)
        assert (found.kv_tokens, found.prefill_tokens, found.live_rows) == (99, 11, 2)


def test_a_gpu_holds_what_its_weights_leave() -> None:
    """An H100 leaves about 55 GB of KV cache beside a 7B: over 200 rows of 288 visual tokens."""
    found = derive_batch_sizes(Cluster(), SEVEN_B, H100)
    assert 50 * GB < found.kv_tokens * SEVEN_B.kv_per_token < 60 * GB
    assert found.kv_tokens // (288 + 60 + 64) > 200


@given(st.floats(0.2, 0.5), st.integers(40, 200))
def test_workers_that_share_a_gpu_fit_on_it(share: float, total: int) -> None:
    memory = replace(H100, total_bytes=total * GB)
    small = replace(SEVEN_B, weights=GB)
    found = derive_batch_sizes(Cluster(gpus_per_worker=share), small, memory)
    taken = small.weights + found.kv_tokens * small.kv_per_token + found.cached_image_bytes
    assert taken * int(1 / share) <= memory.total_bytes * 0.92
    assert found.gpu_share == share


def test_a_whole_batch_may_be_uncompressed() -> None:
    """What its projection takes is not given to the KV cache: 12 MB a view, as an H200 measured."""
    bare = replace(SEVEN_B, packed_per_view=0)
    with_it, without = (derive_batch_sizes(Cluster(), needs, H100) for needs in (SEVEN_B, bare))
    kept = (without.kv_tokens - with_it.kv_tokens) * SEVEN_B.kv_per_token
    assert kept == pytest.approx(160 * 12e6, rel=0.2)


def test_a_share_that_is_too_small_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_worker: a share of 0.2 is 14.7 GB; weights"):
        derive_batch_sizes(Cluster(gpus_per_worker=0.2), SEVEN_B, H100)


def test_a_model_larger_than_a_gpu_is_refused_with_what_would_run_it() -> None:
    seventy = replace(SEVEN_B, weights=141 * GB)
    with pytest.raises(ConfigError, match=r"weights take 141.0 GB, .* has 73.6 GB.*vLLM"):
        derive_batch_sizes(Cluster(), seventy, H100)


def test_a_host_gives_an_eighth_of_its_memory_or_one_long_row() -> None:
    needs = replace(SEVEN_B, kv_per_token=32_768)
    assert derive_batch_sizes(Cluster(), needs, HOST).kv_tokens == 1024 * MIB // 32_768
    little = replace(HOST, total_bytes=GB)
    assert derive_batch_sizes(Cluster(), needs, little).kv_tokens == max(GB // 8 // 32_768, 4096)
    tiny = replace(HOST, total_bytes=GB // 20)
    assert derive_batch_sizes(Cluster(), needs, tiny).kv_tokens == 1024


def test_this_machine_has_memory_and_cores() -> None:
    assert free_host_bytes() > 100 * MIB
    assert cores() >= 1


def test_the_needs_of_a_model_are_those_of_its_weights(
    loaded_models: dict[str, LoadedModel],
) -> None:
    needs = loaded_models["llama3"].adapter.needs()
    model = loaded_models["llama3"].model
    assert needs.weights == sum(p.numel() * 4 for p in model.parameters())
    assert needs.kv_per_token == loaded_models["llama3"].adapter.kv_bytes_per_token
    assert needs.features_per_view == 36 * 32 * 4


def test_a_model_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, tiny_paths: dict[str, Path]
) -> None:
    """From a directory that has none of them."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_paths["vicuna"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = make_recipe(bare)
    _check_fits(recipe, H100)
    with pytest.raises(ConfigError, match="weights take"):
        _check_fits(recipe, replace(H100, total_bytes=100_000))

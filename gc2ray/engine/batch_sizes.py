"""`BatchSizes`: how much an engine processes at a time, derived from model, memory and cores.

Values that the configuration sets are used as they are; the others are derived:

* On a GPU a worker plans with its share of the whole memory, less a reserve for the allocator, its
  weights, the activations of a batch and the image cache. The rest is KV cache. The same share is
  set as torch's cap, so two workers on one GPU cannot take memory from each other.
* On a CPU the KV cache takes up to an eighth of the free memory, and no more than 1 GiB, as
  decoding more rows together gains little there. If it can, it holds one row of full length.

Not covered: memory that other processes take later; host memory for decoded images, which is
bounded by the number of rows that are decoded ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gc2ray.core.config.input import MIB
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.engine.device import Memory
from gc2ray.models.shape import GPU_TOWER_VIEWS, Needs

GPU_USABLE = 0.92
"""Usable part of a worker's share; the rest is for fragments, the CUDA context and workspaces."""
CPU_SHARE, CPU_MOST_BYTES = 1 / 8, 1024 * MIB
SMALLEST_KV_TOKENS = 1024
GPU_GRAPH_STEPS = 8
"""Decoding steps between two checks of which rows have ended."""
GPU_BATCH_VIEWS, CPU_BATCH_VIEWS = 160, 40
"""Views of a batch. On an H200 a 7B at retention 0.1 answers 39.9 rows a second with 160 and 31.2
with 80 (320 rows of 5 views, 32 new tokens, 2026-11-26): more rows are decoded together."""
LONG_PROMPT = 4096
"""Tokens of a long prompt, which is prefilled whole: more than an uncompressed image has."""


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of `Cluster`, all of them set.

    Attributes:
        graph_steps: Decoding steps between two checks of which rows have ended.
        gpu_share: This worker's share of the GPU's memory.
        cached_image_bytes: Packed images that are kept for later rows.
    """

    image_threads: int
    views_per_batch: int
    kv_tokens: int
    prefill_tokens: int
    live_rows: int | None
    graph_steps: int
    gpu_share: float
    cached_image_bytes: int


def derive_batch_sizes(cluster: Cluster, needs: Needs, memory: Memory) -> BatchSizes:
    """The sizes that the configuration sets, and the others derived.

    Raises:
        ConfigError: A worker's share of the GPU is too small for the model.
    """
    share = min(1.0, cluster.gpus_per_worker or 1.0)
    views = cluster.views_per_batch or (GPU_BATCH_VIEWS if memory.is_gpu else CPU_BATCH_VIEWS)
    prefill = cluster.prefill_tokens or (8192 if memory.is_gpu else 2048)
    threads = max(2, min(16, int(memory.cores * share))) if memory.is_gpu else 2
    sizes = BatchSizes(
        image_threads=cluster.image_threads or threads,
        views_per_batch=views,
        kv_tokens=cluster.kv_tokens or 0,
        prefill_tokens=prefill,
        live_rows=cluster.live_rows,
        graph_steps=GPU_GRAPH_STEPS if memory.is_gpu else 1,
        gpu_share=share,
        cached_image_bytes=(256 if memory.is_gpu else 16) * MIB,
    )
    if sizes.kv_tokens:
        return sizes
    tokens = _gpu_tokens(sizes, needs, memory) if memory.is_gpu else _cpu_tokens(needs, memory)
    return replace(sizes, kv_tokens=tokens)


def check_weights_fit(needs: Needs, memory: Memory) -> None:
    """Refuse a model that is larger than a whole device, before its weights are loaded.

    Raises:
        ConfigError: It is.
    """
    whole = int(memory.total_bytes * GPU_USABLE)
    if needs.weights >= whole:
        raise ConfigError(
            f"recipe.model: its weights take {needs.weights / 1e9:.1f} GB, and a whole GPU of this "
            f"kind has {whole / 1e9:.1f} GB for them. gc2ray runs a model on one GPU: use one with "
            "more memory or a smaller model; vLLM (tensor parallel) runs such a model on several "
            "GPUs, uncompressed"
        )


def _gpu_tokens(sizes: BatchSizes, needs: Needs, memory: Memory) -> int:
    usable = int(memory.total_bytes * sizes.gpu_share * GPU_USABLE)
    working = (
        needs.per_view * min(sizes.views_per_batch, GPU_TOWER_VIEWS)
        + 2 * needs.features_per_view * sizes.views_per_batch
        + needs.packed_per_view * sizes.views_per_batch
        + needs.per_token * max(sizes.prefill_tokens, LONG_PROMPT)
        + sizes.cached_image_bytes
    )
    check_weights_fit(needs, memory)
    tokens = (usable - needs.weights - working) // needs.kv_per_token
    if tokens < SMALLEST_KV_TOKENS:
        raise ConfigError(
            f"cluster.gpus_per_worker: a share of {sizes.gpu_share:g} is {usable / 1e9:.1f} GB; "
            f"weights take {needs.weights / 1e9:.1f} GB and a batch {working / 1e9:.1f} GB, which "
            "leaves no memory for a KV cache; set a larger share, or a smaller "
            "cluster.views_per_batch and cluster.prefill_tokens"
        )
    return int(tokens)


def _cpu_tokens(needs: Needs, memory: Memory) -> int:
    budget = min(CPU_MOST_BYTES, int(memory.total_bytes * CPU_SHARE))
    tokens = max(SMALLEST_KV_TOKENS, budget // needs.kv_per_token)
    longest = needs.max_positions
    fits = longest * needs.kv_per_token <= memory.total_bytes // 2
    return max(tokens, longest) if fits else tokens

"""`BatchSizes`: how much an engine takes at a time, derived from model, memory and cores.

Whatever the configuration sets is taken as it is; the rest is derived:

* On a GPU a worker plans with its share of the whole memory, less a reserve for the allocator, its
  weights, the activations of a batch and the pictures it remembers. What is left is KV cache. The
  same share is set as torch's cap, so two workers on one GPU cannot take from each other.
* On a CPU the KV cache takes up to an eighth of the memory that is free, and no more than 1 GiB, as
  decoding more rows together gains little there. It must hold one row of full length if it can.

Not covered: memory that other processes take later; host memory for decoded images, which is
bounded by the rows that are decoded ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gc2ray.core.config.input import MIB
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.engine.device import Memory
from gc2ray.models.shape import Needs

GPU_USABLE = 0.92
"""Of a worker's share; the rest is for fragments, the CUDA context and libraries' workspaces."""
CPU_SHARE, CPU_MOST_BYTES = 1 / 8, 1024 * MIB
SMALLEST_KV_TOKENS = 1024
GPU_BURST = 8
GPU_VIEWS, CPU_VIEWS = 160, 40
"""Views of a batch. On an H200 a 7B at retention 0.1 answers 39.9 rows a second with 160 and 31.2
with 80 (320 rows of 5 views, 32 new tokens, 2026-11-26): more rows are decoded together."""
LONG_PROMPT = 4096
"""Tokens of one prompt that is read in one piece: more than an uncompressed image has."""
TOWER_VIEWS = 32
"""Views that go through the tower at once on a GPU, see `gc2ray.models.families.llava_next`."""


@dataclass(frozen=True)
class BatchSizes:
    """How much at a time; the fields are those of `Cluster`, all of them known.

    Attributes:
        burst: Decode steps between two looks at which rows have ended.
        gpu_share: Share of the GPU's memory that this worker may have.
        remembered_bytes: Packed pictures that are kept for rows to come.
    """

    image_threads: int
    views_per_batch: int
    kv_tokens: int
    prefill_tokens: int
    live_rows: int | None
    burst: int
    gpu_share: float
    remembered_bytes: int


def derive_batch_sizes(cluster: Cluster, needs: Needs, memory: Memory) -> BatchSizes:
    """What the configuration sets, and the rest derived.

    Raises:
        ConfigError: A worker's share of the GPU is too small for the model.
    """
    share = min(1.0, cluster.gpus_per_worker or 1.0)
    views = cluster.views_per_batch or (GPU_VIEWS if memory.is_gpu else CPU_VIEWS)
    prefill = cluster.prefill_tokens or (8192 if memory.is_gpu else 2048)
    threads = max(2, min(16, int(memory.cores * share))) if memory.is_gpu else 2
    found = BatchSizes(
        image_threads=cluster.image_threads or threads,
        views_per_batch=views,
        kv_tokens=cluster.kv_tokens or 0,
        prefill_tokens=prefill,
        live_rows=cluster.live_rows,
        burst=GPU_BURST if memory.is_gpu else 1,
        gpu_share=share,
        remembered_bytes=(256 if memory.is_gpu else 16) * MIB,
    )
    if found.kv_tokens:
        return found
    tokens = _gpu_tokens(found, needs, memory) if memory.is_gpu else _cpu_tokens(needs, memory)
    return replace(found, kv_tokens=tokens)


def _gpu_tokens(found: BatchSizes, needs: Needs, memory: Memory) -> int:
    usable = int(memory.total_bytes * found.gpu_share * GPU_USABLE)
    working = (
        needs.per_view * min(found.views_per_batch, TOWER_VIEWS)
        + 2 * needs.features_per_view * found.views_per_batch
        + needs.packed_per_view * found.views_per_batch
        + needs.per_token * max(found.prefill_tokens, LONG_PROMPT)
        + found.remembered_bytes
    )
    tokens = (usable - needs.weights - working) // needs.kv_per_token
    if tokens < SMALLEST_KV_TOKENS:
        raise ConfigError(
            f"cluster.gpus_per_worker: a share of {found.gpu_share:g} is {usable / 1e9:.1f} GB; "
            f"weights take {needs.weights / 1e9:.1f} GB and a batch {working / 1e9:.1f} GB, which "
            "leaves no room for a KV cache; give a larger share, or fewer cluster.views_per_batch "
            "and cluster.prefill_tokens"
        )
    return int(tokens)


def _cpu_tokens(needs: Needs, memory: Memory) -> int:
    budget = min(CPU_MOST_BYTES, int(memory.total_bytes * CPU_SHARE))
    tokens = max(SMALLEST_KV_TOKENS, budget // needs.kv_per_token)
    longest = needs.max_positions
    fits = longest * needs.kv_per_token <= memory.total_bytes // 2
    return max(tokens, longest) if fits else tokens

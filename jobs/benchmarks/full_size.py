"""A model of full size with random weights: what a row costs at each retention of the paper.

    python -m jobs.bench --model llava-next-7b --random-weights

Nothing is downloaded: the model is made from its sizes alone, on the device. Columns are those of
the paper's table 8 (operations of the prefill over visual tokens, memory, KV cache, latency,
throughput) and, beside them, the share of the device's own roofline: its measured rate of large
matrix products for tower and prefill, and of reading memory for decoding.

Rows are images of noise, 672 x 672, which fill five views: 2880 visual tokens uncompressed. Answers
have 32 tokens; random weights say nothing, so end-of-sequence tokens are off.

Last measured on one NVIDIA H200, 2026-11-26.

Not covered: several GPUs; quality.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from PIL import Image

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import Recipe, parse_recipe
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import ImageRef, Request
from gc2ray.core.stats import STAGES
from gc2ray.demo.photos import jpeg
from gc2ray.engine.batch_sizes import derive_batch_sizes
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.decoder import end_tokens
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.engine.device import memory
from gc2ray.engine.engine import Engine
from gc2ray.estimation.retentions import RETENTIONS
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.families.tiny import TinySpec, untrained
from gc2ray.models.flops import paper_flops
from gc2ray.models.llama import LanguageModel
from gc2ray.models.processor import Processor
from gc2ray.models.registry import adapter_of
from gc2ray.models.shape import TextModel
from jobs.benchmarks import Line
from jobs.benchmarks.support.inputs import IN_PROPORTION, REAL_GEOMETRY
from jobs.benchmarks.support.roofline import answering_stages, ideal_seconds
from jobs.support.answering import answers_in_order

VICUNA_7B = TinySpec(
    image_size=336,
    patch_size=14,
    vision=(1024, 24, 16),
    vision_ffn=4096,
    text=(4096, 32, 32, 32),
    text_ffn=11_008,
    table=32_064,
    spread=0.02,
)
SIZES: dict[str, TinySpec] = {
    "llava-next-7b": VICUNA_7B,
    "llava-next-13b": replace(VICUNA_7B, text=(5120, 40, 40, 40), text_ffn=13_824),
    "small": IN_PROPORTION,
    "tiny": REAL_GEOMETRY,
}
SIDE, NEW_TOKENS, PREFILLS = 672, 32, 5
QUESTION = "Describe the image."
GPU_ROWS, CPU_ROWS = 128, 4


@dataclass(frozen=True)
class Rates:
    """What the device reaches by itself: products a second, and bytes read a second."""

    flops: float
    bytes_read: float


def run(name: str, rows: int | None = None) -> list[Line]:
    """One line for each retention.

    Args:
        name: One of `SIZES`.
        rows: Images; None is enough to fill the device.

    Raises:
        ConfigError: This machine has no device for it.
    """
    device, dtype = _device(name)
    model, stock_processor = untrained(SIZES[name], device=device, dtype=dtype)
    processor = Processor.from_transformers(stock_processor)
    model.eval().generation_config.eos_token_id = None
    adapter = adapter_of(model, processor)
    adapter.freeze()
    loaded = LoadedModel(model, processor, adapter, end_tokens(model))
    rates = _rates(device, dtype)
    count = rows or (GPU_ROWS if device.type == "cuda" else CPU_ROWS)
    requests = _requests(count)
    lines = [_machine_line(name, device, dtype, rates)]
    first: float | None = None
    for retention in RETENTIONS:
        figures = _figures(loaded, retention, requests, rates)
        first = first or figures["samples_per_s"]
        figures["speed_up"] = figures["samples_per_s"] / first
        lines.append(Line(f"retention {retention:g}, {count} rows", figures))
        gc.collect()  # the engine before, and with it most of a GPU
        torch.cuda.empty_cache()
    return lines


def _device(name: str) -> tuple[torch.device, torch.dtype]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    if name.startswith("llava-next"):
        raise ConfigError(f"{name} needs a GPU, and there is none here; --model small does not")
    return torch.device("cpu"), torch.float32


def _requests(rows: int) -> list[Request]:
    noise = np.random.default_rng(0)
    images = [
        jpeg(Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)), 90)
        for _ in range(rows)
    ]
    return [
        Request(f"noise#{row}", "noise", row, (ImageRef(image),), (QUESTION,))
        for row, image in enumerate(images)
    ]


def _figures(
    loaded: LoadedModel, retention: float, requests: Sequence[Request], rates: Rates
) -> dict[str, float]:
    device = loaded.adapter.device
    engine = Engine(loaded, _recipe(retention), Cluster())
    prefill_ms = _prefill_ms(loaded, engine, requests[0])
    answers_in_order(engine, requests)  # warms up, and records a graph for each number of rows
    engine.clear_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    answers = answers_in_order(engine, requests)
    seconds = time.perf_counter() - started
    kept = sum(a.visual_tokens_kept or 0 for a in answers) / len(answers)
    text = TextModel.from_config(loaded.model.config)
    stages = answering_stages(loaded.model.config, answers, NEW_TOKENS, loaded.model.dtype.itemsize)
    ideal = ideal_seconds(stages, rates.flops, rates.bytes_read)
    kv_tokens = derive_batch_sizes(Cluster(), loaded.adapter.needs(), memory(device)).kv_tokens
    # The cache takes what there is, whatever is in use.
    kv_cache_bytes = kv_tokens * loaded.adapter.kv_bytes_per_token
    spent = {stage: sum(a.stage_ns[stage] for a in answers) for stage in STAGES}
    return {
        "visual_tokens": kept,
        "paper_tflops": paper_flops(text, round(kept)) / 1e12,
        "kv_mb": kept * loaded.adapter.kv_bytes_per_token / 1e6,
        "prefill_ms": prefill_ms,
        "samples_per_s": len(answers) / seconds,
        "weights_and_work_gb": max(0, engine.totals().peak_device_bytes - kv_cache_bytes) / 1e9,
        "share_of_roofline": ideal / seconds,
        **{f"share_{stage}": taken / sum(spent.values()) for stage, taken in spent.items()},
    }


def _recipe(retention: float) -> Recipe:
    return parse_recipe(
        {
            "model": {"path": "random"},
            "compression": {"method": "globalcom2", "retention": retention},
            "generation": {"max_new_tokens": NEW_TOKENS},
            "input": {"uri": "-", "prompt": {"constant": QUESTION}},
        }
    )


def _prefill_ms(loaded: LoadedModel, engine: Engine, request: Request) -> float:
    """One prompt by itself, from embeddings to its first token."""
    prompt = engine.prompts([request])[0]
    model = LanguageModel(loaded.model)
    decoder = ContinuousBatchDecoder(model, DecodeLimits(len(prompt) + 1), eos=())
    taken = []
    for tag in range(PREFILLS):
        decoder.submit(tag, prompt, GenerationConfig(max_new_tokens=1))
        taken += [done.prefill_ns / 1e6 for done in decoder.step()]
    return median(taken)


def _rates(device: torch.device, dtype: torch.dtype) -> Rates:
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    vector = torch.randn(side, 1, device=device, dtype=dtype)
    wide = torch.randn(4 * side, side, device=device, dtype=dtype)
    product = _seconds(device, lambda: a @ b)
    read = _seconds(device, lambda: wide @ vector)
    return Rates(2 * side**3 / product, wide.nbytes / read)


def _seconds(device: torch.device, work: Callable[[], object], calls: int = 10) -> float:
    """Median over a few rounds of the time of one call."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    taken = []
    for _ in range(5):
        wait()
        started = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        taken.append((time.perf_counter() - started) / calls)
    return median(taken)


def _machine_line(name: str, device: torch.device, dtype: torch.dtype, rates: Rates) -> Line:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    figures = {"tflops": rates.flops / 1e12, "gb_per_s": rates.bytes_read / 1e9}
    return Line(f"{name}, random weights, {str(dtype).removeprefix('torch.')}, {what}", figures)

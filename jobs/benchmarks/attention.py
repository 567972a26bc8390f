"""Compiled attention against torch's, where the engine has it: views, prompts, decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.models.layers.attention import Chunk, Step
from gc2ray.models.layers.attention_backends import Compiled, attend_by_row
from gc2ray.models.layers.cpu_attention import (
    CompiledAttention,
    MaskPattern,
    SequenceTable,
    compiled_kernel,
)
from jobs.benchmarks import Line
from jobs.benchmarks.support.timing import Work, in_turn, time_ratios

TURNS, CALL_FLOPS = 15, 2e9
VIEW_TOKENS, VIEWS = 577, 8
LAYERS = 8
"""Layers of the KV cache: enough to drive a layer's keys out of the processor's caches."""
CLOSE = 1e-5


@dataclass(frozen=True, eq=False)
class _Case:
    """Two ways to compute the same, and how many FLOPs that is."""

    what: str
    compiled: Callable[[], Tensor]
    torchs: Callable[[], Tensor]
    flops: float


@torch.inference_mode()
def run() -> list[Line]:
    """Each case in turn; where nothing is compiled a line that says so."""
    compiled = compiled_kernel()
    if compiled is None:
        return [Line("not built, or not for this processor: torch's attention is used", {})]
    cases = [
        *(_views(compiled, heads, size) for heads, size in ((3, 32), (16, 64))),
        *(_step(compiled, f"prompt of {n} tokens", [Chunk(0, n, n)]) for n in (300, 700, 2900)),
        _step(
            compiled, "decoding, 32 rows of 300", [Chunk(320 * row, 300, 1) for row in range(32)]
        ),
    ]
    return [_measured(case) for case in cases]


def _measured(case: _Case) -> Line:
    error = float((case.compiled() - case.torchs()).abs().max())
    if error > CLOSE:
        raise RuntimeError(f"{case.what}: compiled and torch's attention differ by {error}")
    works: dict[str, Work] = {"compiled": case.compiled, "torch": case.torchs}
    times = in_turn(works, TURNS, max(1, round(CALL_FLOPS / case.flops)))
    figures = {
        **time_ratios(times["torch"], times["compiled"]),
        "ms": median(times["compiled"].wall) * 1e3,
        "gflops": case.flops / median(times["compiled"].cpu) / 1e9,
        "gflops_torch": case.flops / median(times["torch"].cpu) / 1e9,
    }
    return Line(f"{case.what}; torch threads: {torch.get_num_threads()}", figures)


def _views(compiled: CompiledAttention, heads: int, size: int) -> _Case:
    """All tokens of a view see each other."""
    states = torch.randn(3, VIEWS * VIEW_TOKENS, heads, size)
    pattern = MaskPattern(size**-0.5, causal=False)
    table = SequenceTable.from_sequences(
        [(view * VIEW_TOKENS, VIEW_TOKENS, VIEW_TOKENS) for view in range(VIEWS)]
    )

    def ours() -> Tensor:
        queries, keys, values = states
        return compiled(queries, keys.transpose(0, 1), values.transpose(0, 1), table, pattern)

    def torchs() -> Tensor:
        views = states.view(3, VIEWS, VIEW_TOKENS, heads, size).transpose(2, 3)
        queries, keys, values = views
        out = F.scaled_dot_product_attention(queries, keys, values, scale=pattern.scale)
        return out.transpose(1, 2).reshape(-1, heads, size)

    what = f"{VIEWS} views of {VIEW_TOKENS} tokens, {heads} heads of {size}"
    return _Case(what, ours, torchs, 4 * VIEWS * VIEW_TOKENS**2 * heads * size)


def _step(compiled: CompiledAttention, what: str, chunks: list[Chunk]) -> _Case:
    """A step of the decoder, all layers of it."""
    heads, size = 8, 64
    step = Step.from_chunks(
        chunks, torch.randn(LAYERS, 2, heads, chunks[-1].start + chunks[-1].length, size)
    )
    queries = torch.randn(sum(chunk.new for chunk in chunks), heads, size)

    def attended(attend: Callable[..., Tensor]) -> Tensor:
        outs = [attend(step, layer, queries, size**-0.5, None) for layer in range(LAYERS)]
        return outs[-1]

    seen = sum(chunk.new * (2 * chunk.length - chunk.new + 1) / 2 for chunk in chunks)
    return _Case(
        f"{what}, {heads} heads of {size}, {LAYERS} layers",
        lambda: attended(Compiled(compiled)),
        lambda: attended(attend_by_row),
        4 * seen * heads * size * LAYERS,
    )

"""What this machine can do in a CPU second, and how long work would take at that rate.

Work is a list of stages that follow each other; a stage takes as long as its products at the rate
of a large matrix product, or as its bytes at the rate of a matrix-vector product that comes out of
memory, whichever is longer. Attention, norms and preprocessing cannot reach it: a share of 1 is out
of reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import nn

from gc2ray.core.records import Answer
from gc2ray.models.layers.linear import Linear
from gc2ray.models.shape import ModelShape, cached_reads
from jobs.benchmarks import Line
from jobs.benchmarks.support.timing import Work, in_turn

FLOAT32 = 4
"""Bytes."""
PREFILL, LOGITS = (1024, 512, 1376), (16, 512, 32_000)
"""Tokens, inputs and outputs of a layer as prefill and decoding have them."""
TURNS, CALL_FLOPS = 9, 6e9
MEMORY = (32_768, 4096)
"""512 MiB in float32: no cache holds it."""
PACKED_GAIN = 1.8
"""From here on prepacked layers are so much faster that the total is held to its own goal."""


@dataclass(frozen=True)
class Stage:
    """Products and bytes that have to be done before the next stage."""

    flops: float
    bytes_read: float


@dataclass(frozen=True)
class Machine:
    """One CPU second of this machine, with as many torch threads as there are.

    Attributes:
        plain: FLOP/s of `nn.Linear`, float32, at the size of a prefill.
        packed: The same of a prepacked layer.
        plain_logits: At the size of logits of 16 rows.
        packed_logits: Likewise.
        bytes_per_s: Read from memory.
    """

    plain: float
    packed: float
    plain_logits: float
    packed_logits: float
    bytes_per_s: float

    @property
    def flops_per_s(self) -> float:
        """The better of the two."""
        return max(self.plain, self.packed)

    @property
    def packed_gain(self) -> float:
        """How much faster prepacked layers are."""
        return self.packed / self.plain

    def ideal_seconds(self, stages: Iterable[Stage]) -> float:
        """How long work takes at the machine's rates."""
        return ideal_seconds(stages, self.flops_per_s, self.bytes_per_s)

    def line(self) -> Line:
        """Its rates, as a line of the table."""
        holds = "holds" if self.packed_gain >= PACKED_GAIN else "does not hold"
        figures = {
            "plain_gflops": self.plain / 1e9,
            "packed_gflops": self.packed / 1e9,
            "packed_gain": self.packed_gain,
            "plain_gflops_logits": self.plain_logits / 1e9,
            "packed_gflops_logits": self.packed_logits / 1e9,
            "memory_gb_per_s": self.bytes_per_s / 1e9,
        }
        what = "machine, a CPU second: {}x{}x{} and logits {}x{}x{}".format(*PREFILL, *LOGITS)
        return Line(what, figures, f"prepacked {PACKED_GAIN:g}x plain, for the total goal: {holds}")


def ideal_seconds(stages: Iterable[Stage], flops_per_s: float, bytes_per_s: float) -> float:
    """How long stages take one after the other, each at the rate that bounds it."""
    return sum(max(stage.flops / flops_per_s, stage.bytes_read / bytes_per_s) for stage in stages)


def answering_stages(
    config: Any, answers: Sequence[Answer], new_tokens: int, itemsize: int = FLOAT32
) -> tuple[Stage, Stage, Stage]:
    """What answers of one length need: tower and projector, prefill, decoding together.

    Args:
        config: Config of a LLaVA-NeXT model.
        answers: What was answered; nothing is counted for preprocessing.
        new_tokens: Tokens of each answer.
        itemsize: Bytes of a weight and of a cached number.
    """
    shape = ModelShape.from_config(config, itemsize)
    tower, text = shape.tower, shape.text
    prompts = [answer.prompt_tokens or 0 for answer in answers]
    views = sum(len(per) for answer in answers for per in answer.kept_per_view or ())
    kept = sum(answer.visual_tokens_kept or 0 for answer in answers)
    prefill = sum(text.needed_prefill(length) for length in prompts)
    decode = sum(text.decode(length, new_tokens) for length in prompts)
    cache = text.cached_numbers * sum(cached_reads(length, new_tokens) for length in prompts)
    return (
        Stage(tower.needed(views) + tower.projector(kept), itemsize * tower.batch_weights),
        Stage(prefill, itemsize * text.step_weights),
        Stage(decode, itemsize * ((new_tokens - 1) * text.step_weights + cache)),
    )


@cache
def measured_machine() -> Machine:
    """Measure it, once in a process."""
    with torch.inference_mode():
        plain, packed = _layer_rates(*PREFILL)
        plain_logits, packed_logits = _layer_rates(*LOGITS)
        return Machine(plain, packed, plain_logits, packed_logits, _memory_rate())


def _layer_rates(tokens: int, inputs: int, outputs: int) -> tuple[float, float]:
    """FLOP/s of a plain and of a prepacked layer."""
    layer = nn.Linear(inputs, outputs, bias=False)
    packed, states = Linear.from_layers(layer), torch.randn(tokens, inputs)
    works: dict[str, Work] = {"plain": lambda: layer(states), "packed": lambda: packed(states)}
    flops = 2 * tokens * inputs * outputs
    calls = max(1, round(CALL_FLOPS / flops))
    in_turn(works, turns=1)  # warms up
    times = in_turn(works, TURNS, calls)
    return flops / median(times["plain"].cpu), flops / median(times["packed"].cpu)


def _memory_rate() -> float:
    matrix, vector = torch.ones(MEMORY), torch.ones(MEMORY[1])
    times = in_turn({"read": lambda: matrix @ vector}, TURNS)["read"]
    return matrix.nbytes / median(times.cpu)

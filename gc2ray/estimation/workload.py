"""`Workload`: the work that an input's prompts ask of a device at one retention.

Tokens before compression follow from the sizes of the images. Tokens after compression lie within
bounds that hold whatever the scores (`Compressor.bounds`); newlines lie within bounds that follow
from those.

Not covered: prefixes and images shared by rows that lie far apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gc2ray.core.config.recipe import Recipe
from gc2ray.core.intervals import Interval
from gc2ray.estimation.input_profile import InputProfile, PromptShape
from gc2ray.estimation.roofline import Work, WorkRange
from gc2ray.estimation.token_bounds import RowBounds
from gc2ray.models.base import ModelMetadata
from gc2ray.models.flops import AnswerTokens, demand_of

ENDS = 3
NO_WORK: WorkRange = (Work(), Work(), Work())
DISAGREEING = (0.0, 0.5, 1.0)
"""Share of the audited rows that are answered again at each escalation step, at the low end, the
best guess and the high end: it is not known before the run."""


@dataclass(frozen=True)
class Workload:
    """The work that all prompts ask for at one retention.

    Attributes:
        method: The compression method.
        retention: The fraction KEPT, nominal.
        visual_tokens: Kept of all images.
        newline_tokens: Newlines between them.
        prompt_tokens: Average of a prompt, text included.
        longest: Tokens of the longest sampled prompt and its answer, at most.
        too_long: Prompts that the model cannot read.
        work: Work of answering, without audits.
        audit_work: Work of audits, beside it.
    """

    method: str
    retention: float
    visual_tokens: Interval
    newline_tokens: Interval
    prompt_tokens: Interval
    longest: int
    too_long: Interval
    work: WorkRange
    audit_work: WorkRange = NO_WORK

    @property
    def flops(self) -> Mapping[str, Interval]:
        """Operations of answering by stage."""
        low, mid, high = self.work
        return {s: Interval(low.flops[s], mid.flops[s], high.flops[s]) for s in mid.flops}

    def with_audits(
        self, share: float, uncompressed: Workload, steps: Sequence[Workload]
    ) -> Workload:
        """The same workload when some answers are audited.

        Args:
            share: Share of the prompts.
            uncompressed: All prompts uncompressed.
            steps: All prompts at the retentions of the escalation steps, in order.
        """
        low, mid, high = (
            sum(
                (step.work[end].part(share * again**n) for n, step in enumerate(steps, 1)),
                uncompressed.work[end].part(share),
            )
            for end, again in enumerate(DISAGREEING)
        )
        return replace(self, audit_work=(low, mid, high))


def estimate_workload(
    profile: InputProfile, model: ModelMetadata, recipe: Recipe, output_tokens: Interval
) -> Workload:
    """The work that an input asks for, without audits.

    Args:
        profile: Profile of the input.
        model: Without weights.
        recipe: What is computed.
        output_tokens: Tokens of an answer.
    """
    prompt_measures = _PromptMeasures(model, recipe, output_tokens)
    measures = {shape: prompt_measures.at_each_end(shape) for shape in profile.prompts}
    nothing = np.zeros((ENDS, len(_MEASURES)))
    by_block = np.array(
        [
            sum((count * measures[shape] for shape, count in block.prompts.items()), nothing)
            for block in profile.blocks
        ]
    )  # (blocks, 3, M)

    def total(name: str) -> Interval:
        ends = [profile.scaled(by_block[:, end, _MEASURES.index(name)]) for end in range(ENDS)]
        return Interval(ends[0].low, ends[1].mid, ends[2].high)

    totals = {name: total(name) for name in _MEASURES}
    prompts = totals["prompts"]
    return Workload(
        method=recipe.compression.method,
        retention=recipe.compression.retention_requested,
        visual_tokens=totals["visual"],
        newline_tokens=totals["newlines"],
        prompt_tokens=totals["prompt"].scaled(1 / max(1.0, prompts.mid)),
        longest=max((prompt_measures.longest(shape) for shape in measures), default=0),
        too_long=totals["too_long"],
        work=(_work(totals, "low"), _work(totals, "mid"), _work(totals, "high")),
    )


_STAGES = ("encode", "compress", "prefill", "generate")
_MEASURES = (
    *_STAGES, "cache_read", "visual", "newlines", "prompt", "output", "prompts", "too_long",
)  # fmt: skip


class _PromptMeasures:
    """The work of single prompts."""

    def __init__(self, model: ModelMetadata, recipe: Recipe, output_tokens: Interval) -> None:
        self._shape = model.shape
        self._compression = recipe.compression
        self._new = recipe.generation.max_new_tokens
        self._output = output_tokens
        self._limit = model.shape.text.max_positions
        self._bounds = RowBounds(recipe.compression)

    def at_each_end(self, shape: PromptShape) -> np.ndarray:
        """`_MEASURES` at each end, float64 (3, M)."""
        output = self._output.ends
        # Whether the beginning of a prompt is computed once or again depends on when rows meet.
        shares = (True, True, False)
        return np.array(
            [self._one(shape, end, output[end], shares=shares[end]) for end in range(ENDS)]
        )

    def longest(self, shape: PromptShape) -> int:
        """Tokens of a prompt and its answer, at most."""
        bounds = self._bounds.of([image.geometry for image in shape.images])
        images = sum(b.visual.high + b.newlines.high + b.markers.high for b in bounds)
        return math.ceil(shape.text_tokens + images) + self._new

    def _one(self, shape: PromptShape, end: int, output: float, *, shares: bool) -> list[float]:
        """`_MEASURES` at one end."""
        bounds = self._bounds.of([image.geometry for image in shape.images])
        visual, newlines, markers = (
            [getattr(each, name).ends[end] for each in bounds]
            for name in ("visual", "newlines", "markers")
        )
        packed = [round(sum(of_image)) for of_image in zip(visual, newlines, markers, strict=True)]
        prompt = shape.text_tokens + sum(packed)
        tokens = AnswerTokens(
            views=sum(len(image.geometry.views) for image in shape.new),
            projected=sum(
                count for image, count in zip(shape.images, packed, strict=True) if image.is_new
            ),
            prompt=prompt,
            output=max(1, round(output)),
            shared=_shared_tokens(shape, packed) if shares else 0,
        )
        demand = demand_of(self._shape, tokens)
        stages = [float(demand.flops[stage]) for stage in _STAGES]
        too_long = float(self._end_position(shape, prompt) + self._new > self._limit)
        counts = [sum(visual), sum(newlines), prompt, output, 1.0, too_long]
        return [*stages, demand.cache_read_bytes, *counts]

    def _end_position(self, shape: PromptShape, prompt: int) -> int:
        """One behind the last position of a prompt."""
        if self._compression.positions == "compact":
            return prompt
        return shape.text_tokens + sum(len(image.geometry.entries) for image in shape.images)


def _shared_tokens(shape: PromptShape, packed: Sequence[int]) -> int:
    """Tokens up to the last of the first images that an earlier prompt shows, too."""
    shared = 0
    for index, image in enumerate(shape.images):
        if image.is_new:
            break
        shared = image.leading_tokens + sum(packed[: index + 1])
    return shared


def _work(totals: Mapping[str, Interval], end: str) -> Work:
    def at(name: str) -> int:
        value = getattr(totals[name], end)
        return round(value) if np.isfinite(value) else round(2 * totals[name].mid)

    return Work(
        rows=at("prompts"),
        output_tokens=at("output"),
        flops={stage: at(stage) for stage in _STAGES},
        cache_read_bytes=at("cache_read"),
    )

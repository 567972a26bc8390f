"""`Workload`: what the prompts of an input will ask of a device at one retention.

Tokens before compression follow from the images' sizes. Tokens after it lie within bounds that hold
whatever the scores (`Compressor.bounds`), newlines within those that follow from them.

Not covered: prefixes and images shared by rows that lie far apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.intervals import Interval
from gc2ray.core.stats import RunStats
from gc2ray.estimate.input_profile import InputProfile, PromptShape
from gc2ray.models.base import ModelMetadata
from gc2ray.models.flops import AnswerTokens, demand_of

Ends = tuple[RunStats, RunStats, RunStats]
"""At the low end, the best guess and the high end."""
ENDS = 3
NOTHING: Ends = (RunStats(), RunStats(), RunStats())
DISAGREEING = (0.0, 0.5, 1.0)
"""Of the audited rows at each rung, those that are answered anew, likewise: nobody knows before."""


@dataclass(frozen=True)
class TokenBounds:
    """What is left of an image.

    Attributes:
        visual: Visual tokens.
        newlines: Newline tokens.
    """

    visual: Interval
    newlines: Interval

    @staticmethod
    def from_canvas(canvas: Canvas, compression: CompressionConfig) -> TokenBounds:
        """By an image's geometry alone."""
        low, high = CompressionPolicy.from_config(compression).compressor.bounds(canvas)
        visual = Interval(low, (low + high) / 2, high)
        if compression.newlines == "none":
            return TokenBounds(visual, Interval.exactly(0))
        if compression.newlines == "all" or low == sum(canvas.tokens_per_view()):
            return TokenBounds(visual, Interval.exactly(canvas.newlines))
        thumbnail = canvas.tokens_per_view()[0]
        share = compression.retention_requested
        of_crops = [max(0.0, end - thumbnail * share) for end in (low, (low + high) / 2, high)]
        rows = canvas.grid[0] * canvas.side[0]
        fewest = math.ceil(of_crops[0] / max(1, canvas.width))
        # Tokens that fall on rows at random leave each row empty with (1 - 1/rows)^tokens.
        filled = canvas.height * (1 - (1 - 1 / max(1, canvas.height)) ** of_crops[1])
        most = rows if compression.method == "globalcom2-reference" else canvas.height
        return TokenBounds(visual, Interval(min(fewest, filled), filled, most))


@dataclass(frozen=True)
class Workload:
    """What all prompts ask for at one retention.

    Attributes:
        method: The compression method.
        retention: The fraction KEPT, nominal.
        visual_tokens: Kept of all images.
        newline_tokens: Newlines between them.
        prompt_tokens: Of a prompt, text included, on average.
        longest: Tokens of the longest prompt that was seen and of its answer, at most.
        too_long: Prompts that the model cannot read.
        ends: Statistics of the run at the low end, the best guess and the high end.
        audits: What second looks at some answers ask for beside, likewise.
    """

    method: str
    retention: float
    visual_tokens: Interval
    newline_tokens: Interval
    prompt_tokens: Interval
    longest: int
    too_long: Interval
    ends: Ends
    audits: Ends = NOTHING

    @property
    def flops(self) -> Mapping[str, Interval]:
        """By stage."""
        low, mid, high = self.ends
        return {s: Interval(low.flops[s], mid.flops[s], high.flops[s]) for s in mid.flops}

    def audited(self, share: float, whole: Workload, rungs: Sequence[Workload]) -> Workload:
        """The same, with a second look at some answers.

        Args:
            share: Of the prompts.
            whole: All of them uncompressed.
            rungs: All of them at the retentions at which those that disagree are answered anew.
        """
        low, mid, high = (
            sum(
                (_part(rung.ends[end], share * anew**times) for times, rung in enumerate(rungs, 1)),
                _part(whole.ends[end], share),
            )
            for end, anew in enumerate(DISAGREEING)
        )
        return replace(self, audits=(low, mid, high))


def forecast_workload(
    survey: InputProfile, outline: ModelMetadata, recipe: Recipe, output_tokens: Interval
) -> Workload:
    """What an input asks for.

    Args:
        survey: Its rows.
        outline: The model.
        recipe: What is computed.
        output_tokens: Of an answer.
    """
    rows = _Rows(outline, recipe, output_tokens)
    sums = {shown: rows.measures(shown) for shown in survey.prompts}
    nothing = np.zeros((ENDS, len(_MEASURES)))
    by_stretch = np.array(
        [
            sum((count * sums[shown] for shown, count in stretch.prompts.items()), nothing)
            for stretch in survey.stretches
        ]
    )  # (S, 3, M)

    def total(name: str) -> Interval:
        ends = [survey.scaled(by_stretch[:, end, _MEASURES.index(name)]) for end in range(ENDS)]
        return Interval(ends[0].low, ends[1].mid, ends[2].high)

    totals = {name: total(name) for name in _MEASURES}
    prompts = totals["prompts"]
    return Workload(
        method=recipe.compression.method,
        retention=recipe.compression.retention_requested,
        visual_tokens=totals["visual"],
        newline_tokens=totals["newlines"],
        prompt_tokens=Interval(
            *(
                end / max(1.0, prompts.mid)
                for end in (totals["prompt"].low, totals["prompt"].mid, totals["prompt"].high)
            )
        ),
        longest=max((rows.longest(shown) for shown in sums), default=0),
        too_long=totals["too_long"],
        ends=tuple(_stats(totals, end) for end in ("low", "mid", "high")),  # type: ignore[arg-type]
    )


_STAGES = ("encode", "compress", "prefill", "generate")
_MEASURES = (
    *_STAGES, "cache_read", "visual", "newlines", "prompt", "output", "prompts", "too_long",
)  # fmt: skip


class _Rows:
    """What single prompts ask for."""

    def __init__(self, outline: ModelMetadata, recipe: Recipe, output_tokens: Interval) -> None:
        self._shape = outline.shape
        self._compression = recipe.compression
        self._new = recipe.generation.max_new_tokens
        self._output = output_tokens
        self._limit = outline.shape.text.max_positions
        self._kept: dict[Canvas, TokenBounds] = {}

    def kept(self, canvas: Canvas) -> TokenBounds:
        found = self._kept.get(canvas)
        if found is None:
            found = self._kept[canvas] = TokenBounds.from_canvas(canvas, self._compression)
        return found

    def measures(self, shown: PromptShape) -> np.ndarray:
        """`_MEASURES` at each end, float64 (3, M)."""
        kept = self.kept(shown.canvas)
        ends = zip(*(_ends(r) for r in (kept.visual, kept.newlines, self._output)), strict=True)
        # Whether the beginning of a prompt is computed once or again depends on when rows meet.
        shares = (True, True, False)
        found = zip(ends, shares, strict=True)
        return np.array(
            [self._one(shown, *end, shares=it and not shown.is_new) for end, it in found]
        )

    def longest(self, shown: PromptShape) -> int:
        kept = self.kept(shown.canvas)
        return math.ceil(shown.text_tokens + kept.visual.high + kept.newlines.high) + self._new

    def _one(
        self, shown: PromptShape, visual: float, newlines: float, output: float, *, shares: bool
    ) -> list[float]:
        image = round(visual + newlines)
        prompt = shown.text_tokens + image
        tokens = AnswerTokens(
            views=(1 + shown.canvas.crops) * shown.is_new,
            projected=image * shown.is_new,
            prompt=prompt,
            output=max(1, round(output)),
            shared=shown.leading_tokens + image if shares else 0,
        )
        demand = demand_of(self._shape, tokens)
        stages = [float(demand.flops[stage]) for stage in _STAGES]
        too_long = float(self._stop(shown, prompt) + self._new > self._limit)
        return [*stages, demand.cache_read_bytes, visual, newlines, prompt, output, 1.0, too_long]

    def _stop(self, shown: PromptShape, prompt: int) -> int:
        """Behind the last position of a prompt."""
        if self._compression.positions == "compact":
            return prompt
        canvas = shown.canvas
        return shown.text_tokens + sum(canvas.tokens_per_view()) + canvas.newlines


def _part(stats: RunStats, share: float) -> RunStats:
    """What a share of the prompts asks for."""
    return RunStats(
        rows=round(stats.rows * share),
        output_tokens=round(stats.output_tokens * share),
        flops={stage: round(flops * share) for stage, flops in stats.flops.items()},
        cache_read_bytes=round(stats.cache_read_bytes * share),
    )


def _ends(value: Interval) -> tuple[float, float, float]:
    return value.low, value.mid, value.high


def _stats(totals: Mapping[str, Interval], end: str) -> RunStats:
    def at(name: str) -> int:
        value = getattr(totals[name], end)
        return round(value) if np.isfinite(value) else round(2 * totals[name].mid)

    return RunStats(
        rows=at("prompts"),
        visual_tokens_kept=at("visual"),
        newline_tokens=at("newlines"),
        prompt_tokens=at("prompt"),
        output_tokens=at("output"),
        flops={stage: at(stage) for stage in _STAGES},
        cache_read_bytes=at("cache_read"),
    )

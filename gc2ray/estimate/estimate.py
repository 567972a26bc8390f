"""What a run will cost, before any of it is spent: rows, tokens, time, memory, money.

Rows are counted by a `InputProfile`, what they ask for by a `Workload`, and what that takes on a
device by an `DeviceEstimate`. Whatever is not known is a `Interval`, whose ends take everything
unknown together.

Not covered: retries, and a cluster that shares its machines with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.intervals import Interval
from gc2ray.estimate.device_estimate import DeviceEstimate, DeviceEstimator
from gc2ray.estimate.hardware import Hardware
from gc2ray.estimate.input_profile import InputProfile, PromptShape, SampleBlock
from gc2ray.estimate.measured_rates import MeasuredRates
from gc2ray.estimate.workload import Workload, forecast_workload
from gc2ray.models.base import ModelMetadata

RETENTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
"""What is compared, beside the recipe's own: those of the paper's table 8."""
DEFAULT_METHOD = "globalcom2"
"""What other retentions are compared with where the recipe's method has none to set."""


@dataclass(frozen=True)
class Estimate:
    """What a run will cost.

    Attributes:
        rows: Of the input.
        looked: Rows whose image headers and prompts were read.
        prompts: That can be answered, as far as headers tell.
        refused: That cannot, by status.
        images: That are decoded and encoded.
        views: Of those images.
        visual_tokens_full: Of all prompts' images before compression.
        text_tokens: The rest of all prompts.
        output_tokens: Of an answer.
        output_basis: Where that is from.
        forecasts: By retention, the recipe's first.
        offers: By hardware and retention.
    """

    rows: int
    looked: int
    prompts: Interval
    refused: Mapping[str, Interval]
    images: Interval
    views: Interval
    visual_tokens_full: Interval
    text_tokens: Interval
    output_tokens: Interval
    output_basis: str
    forecasts: tuple[Workload, ...]
    offers: tuple[DeviceEstimate, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        data = asdict(self)
        for item, found in zip(data["forecasts"], self.forecasts, strict=True):
            del item["ends"], item["audits"]
            item["flops"] = {stage: asdict(flops) for stage, flops in found.flops.items()}
        return data


@dataclass(frozen=True)
class Assumptions:
    """What an input cannot tell.

    Attributes:
        output_tokens: Of an answer; None: from the pace, or else up to the recipe's limit.
        pace: Of an earlier run.
        hours: That the run may take, where the cluster does not say how many workers it has.
        retentions: Compared beside the recipe's own.
    """

    output_tokens: float | None = None
    pace: MeasuredRates | None = None
    hours: float = 1.0
    retentions: tuple[float, ...] = RETENTIONS


def estimate(
    survey: InputProfile,
    outline: ModelMetadata,
    job: Job,
    hardware: Sequence[Hardware],
    assumptions: Assumptions,
) -> Estimate:
    """What a run will cost.

    Args:
        survey: Its rows.
        outline: Its model.
        job: What is computed, and how.
        hardware: Devices that are compared.
        assumptions: What the input cannot tell.
    """
    output, basis = _output(job.recipe, assumptions)
    foresee = _Foresight(survey, outline, output)
    forecasts = tuple(foresee(recipe) for recipe in _recipes(job.recipe, assumptions.retentions))
    pace = assumptions.pace
    bid = DeviceEstimator(outline.shape, job.cluster, assumptions.hours, pace)
    offers = [bid.offer(found, device) for device in hardware for found in forecasts]
    if pace is not None and not any(pace.device in device.devices for device in hardware):
        offers = [*(bid.known(found, pace) for found in forecasts), *offers]

    def total(measure: Callable[[PromptShape], float]) -> Interval:
        def of(stretch: SampleBlock) -> float:
            return sum(count * measure(shown) for shown, count in stretch.prompts.items())

        return survey.total(of)

    return Estimate(
        rows=survey.rows,
        looked=survey.looked,
        prompts=total(lambda _: 1),
        refused={
            str(status): survey.scaled(np.array([s.refused[status] for s in survey.stretches]))
            for status in sorted(survey.refused)
        },
        images=total(lambda shown: shown.is_new),
        views=total(lambda shown: shown.is_new * (1 + shown.canvas.crops)),
        visual_tokens_full=total(lambda shown: sum(shown.canvas.tokens_per_view())),
        text_tokens=total(lambda shown: shown.text_tokens),
        output_tokens=output,
        output_basis=basis,
        forecasts=forecasts,
        offers=tuple(offers),
    )


@dataclass
class _Foresight:
    """Forecasts of recipes about the same rows, of which audits need some more than once."""

    survey: InputProfile
    outline: ModelMetadata
    output: Interval
    _plain: dict[CompressionConfig, Workload] = field(default_factory=dict)

    def __call__(self, recipe: Recipe) -> Workload:
        found = self._without_audit(recipe, recipe.compression)
        if not recipe.audit.share or recipe.compression.keeps_everything:
            return found
        whole, *rungs = (
            self._without_audit(recipe, config)
            for config in (CompressionConfig(method="none"), *recipe.rungs().values())
        )
        higher = [rung for rung in rungs if rung.retention > found.retention]
        return found.audited(recipe.audit.share, whole, higher)

    def _without_audit(self, recipe: Recipe, config: CompressionConfig) -> Workload:
        known = self._plain.get(config)
        if known is None:
            asked = recipe.model_copy(update={"compression": config})
            known = forecast_workload(self.survey, self.outline, asked, self.output)
            self._plain[config] = known
        return known


def _recipes(recipe: Recipe, retentions: Sequence[float]) -> list[Recipe]:
    """The recipe, and the same with other retentions."""
    own = recipe.compression
    method = own.method if own.kind.takes_retention else DEFAULT_METHOD
    others = [kept for kept in retentions if kept != own.retention_requested]
    return [
        recipe,
        *(
            recipe.model_copy(
                update={"compression": own.model_copy(update={"method": method, "retention": kept})}
            )
            for kept in others
        ),
    ]


def _output(recipe: Recipe, assumptions: Assumptions) -> tuple[Interval, str]:
    """Tokens of an answer, and where they are from."""
    limit = recipe.generation.max_new_tokens
    if assumptions.output_tokens is not None:
        return Interval.exactly(min(limit, assumptions.output_tokens)), "as given"
    if assumptions.pace is not None:
        found = assumptions.pace.output_tokens
        ends = (min(limit, end) for end in (found.low, found.mid, found.high))
        return Interval(*ends), f"as in the run on {assumptions.pace.device}"
    half = max(1.0, limit / 2)
    return Interval(1.0, half, limit), f"1 to max_new_tokens, {limit}; --output-tokens tells better"

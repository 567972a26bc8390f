"""The cost of a run before it starts: rows, tokens, time, memory, money.

`InputProfile` counts rows, `Workload` the work that they ask for, and `DeviceEstimate` says what
that takes on a device. A figure that is not known exactly is an `Interval` that covers everything
unknown together.

Not covered: retries, and a cluster that shares its machines with others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gc2ray.core.arguments import check_count, check_range
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.intervals import Interval
from gc2ray.estimation.device_estimate import DeviceEstimate, RunSetup, estimate_device
from gc2ray.estimation.hardware import Hardware, find_hardware, incomplete_notes
from gc2ray.estimation.input_profile import (
    InputProfile,
    PromptShape,
    SampleBlock,
    profile_input,
)
from gc2ray.estimation.measured_rates import MeasuredRates
from gc2ray.estimation.retentions import DEFAULT_METHOD, RETENTIONS
from gc2ray.estimation.workload import Workload, estimate_workload
from gc2ray.models.base import ModelMetadata
from gc2ray.models.checkpoint.fetch import fetch_metadata
from gc2ray.models.loading import load_metadata


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        rows: Rows of the input.
        sampled_rows: Rows whose image headers and prompts were read.
        prompts: Prompts that can be answered, as far as headers show.
        refused: Prompts that cannot be answered, by status.
        images: To be decoded and encoded.
        views: Views of those images.
        visual_tokens_full: Visual tokens of all prompts' images before compression.
        text_tokens: Other tokens of all prompts, those around views included.
        output_tokens: Tokens of an answer.
        output_basis: Where that figure comes from.
        workloads: By retention, the recipe's first.
        devices: Estimates by hardware and retention.
        left_out: Devices without an estimate, and why: one line for all with the same reason.
    """

    rows: int
    sampled_rows: int
    prompts: Interval
    refused: Mapping[str, Interval]
    images: Interval
    views: Interval
    visual_tokens_full: Interval
    text_tokens: Interval
    output_tokens: Interval
    output_basis: str
    workloads: tuple[Workload, ...]
    devices: tuple[DeviceEstimate, ...]
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name; of a workload its operations by stage, not its ends."""
        data = asdict(self)
        for item, workload in zip(data["workloads"], self.workloads, strict=True):
            del item["work"], item["audit_work"]
            item["flops"] = {stage: asdict(flops) for stage, flops in workload.flops.items()}
        return data


@dataclass(frozen=True)
class Assumptions:
    """Assumptions that the input does not settle.

    Attributes:
        output_tokens: Tokens of an answer; None: as in the earlier run, or else up to the
            recipe's limit.
        rates: Measured in an earlier run.
        hours: Wanted duration of the run, where the cluster does not set the number of workers.
        retentions: Compared beside the recipe's own.

    Raises:
        ConfigError: A number is out of range.
    """

    output_tokens: float | None = None
    rates: MeasuredRates | None = None
    hours: float = 1.0
    retentions: tuple[float, ...] = RETENTIONS

    def __post_init__(self) -> None:
        if self.output_tokens is not None:
            check_range("output_tokens", self.output_tokens, 1)
        check_range("hours", self.hours, 0.01)


def estimate_run(
    job: Job,
    hardware: Sequence[Hardware],
    assumptions: Assumptions,
    rows: int | None,
    progress: Callable[[int], None] | None = None,
) -> Estimate:
    """Read a sample of a job's input and the metadata of its model, and estimate the cost of a run.

    Args:
        job: What would be computed.
        hardware: Devices to compare; those without peaks are left out.
        assumptions: What the input does not settle.
        rows: Size of the sample, about; None: all rows.
        progress: Called with the number of rows that were read.

    Raises:
        ConfigError: `rows` is out of range, or model or input cannot be read.
    """
    if rows is not None:
        check_count("rows", rows, 1)
    recipe = job.recipe
    model = load_metadata(
        str(fetch_metadata(recipe.model)),
        dtype=recipe.model.dtype,
        taken_over=recipe.taken_over(),
    )
    profile = profile_input(recipe, model, rows, progress or (lambda _: None))
    return estimate_profile(profile, model, job, hardware, assumptions)


def estimate_profile(
    profile: InputProfile,
    model: ModelMetadata,
    job: Job,
    hardware: Sequence[Hardware],
    assumptions: Assumptions,
) -> Estimate:
    """Estimate the cost of a run from the profile of its input.

    Args:
        profile: Profile of its input.
        model: Metadata of its model.
        job: Recipe and cluster.
        hardware: Devices to compare; those without peaks are left out.
        assumptions: What the input does not settle.
    """
    output, basis = _output(job.recipe, assumptions)
    workload_of = _Workloads(profile, model, output)
    workloads = tuple(workload_of(recipe) for recipe in _recipes(job.recipe, assumptions))
    setup = RunSetup(model.shape, job.cluster, assumptions.hours, assumptions.rates)
    usable = _usable(hardware, assumptions.rates)
    names = {item.name for item in usable}

    def total(measure: Callable[[PromptShape], float]) -> Interval:
        def of_block(block: SampleBlock) -> float:
            return sum(count * measure(shape) for shape, count in block.prompts.items())

        return profile.total(of_block)

    return Estimate(
        rows=profile.rows,
        sampled_rows=profile.sampled_rows,
        prompts=total(lambda _: 1),
        refused={
            str(status): profile.scaled(np.array([b.refused[status] for b in profile.blocks]))
            for status in sorted(profile.refused)
        },
        images=total(lambda shape: len(shape.new)),
        views=total(lambda shape: sum(len(image.geometry.views) for image in shape.new)),
        visual_tokens_full=total(
            lambda shape: sum(image.geometry.visual_tokens for image in shape.images)
        ),
        text_tokens=total(
            lambda shape: shape.text_tokens + sum(i.geometry.literals for i in shape.images)
        ),
        output_tokens=output,
        output_basis=basis,
        workloads=workloads,
        devices=tuple(
            estimate_device(workload, item, setup) for item in usable for workload in workloads
        ),
        left_out=tuple(
            incomplete_notes([h for h in hardware if h.name not in names], "No estimate for")
        ),
    )


def _usable(hardware: Sequence[Hardware], rates: MeasuredRates | None) -> list[Hardware]:
    """Devices with peaks, after the one of the earlier run where that has none."""
    usable = [item for item in hardware if item.peaks is not None]
    if rates is None or find_hardware(usable, rates.device) is not None:
        return usable
    measured = find_hardware(hardware, rates.device) or Hardware(
        name=rates.device, devices=(rates.device,), missing="not in the hardware table"
    )
    return [measured, *usable]


@dataclass
class _Workloads:
    """Workloads of recipes for the same rows; audits need some workloads more than once."""

    profile: InputProfile
    model: ModelMetadata
    output: Interval
    _unaudited: dict[CompressionConfig, Workload] = field(default_factory=dict)

    def __call__(self, recipe: Recipe) -> Workload:
        own = self._without_audit(recipe, recipe.compression)
        if not recipe.audit.share or recipe.compression.keeps_everything:
            return own
        uncompressed, *steps = (
            self._without_audit(recipe, config)
            for config in (CompressionConfig(method="none"), *recipe.escalation_steps().values())
        )
        higher = [step for step in steps if step.retention > own.retention]
        return own.with_audits(recipe.audit.share, uncompressed, higher)

    def _without_audit(self, recipe: Recipe, config: CompressionConfig) -> Workload:
        if config not in self._unaudited:
            changed = recipe.model_copy(update={"compression": config})
            self._unaudited[config] = estimate_workload(
                self.profile, self.model, changed, self.output
            )
        return self._unaudited[config]


def _recipes(recipe: Recipe, assumptions: Assumptions) -> list[Recipe]:
    """The recipe, and the same with other retentions."""
    own = recipe.compression
    method = own.method if own.kind.takes_retention else DEFAULT_METHOD
    others = [kept for kept in assumptions.retentions if kept != own.retention_requested]
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
    """Tokens of an answer, and where the figure comes from."""
    limit = recipe.generation.max_new_tokens
    if assumptions.output_tokens is not None:
        return Interval.exactly(min(limit, assumptions.output_tokens)), "as given"
    if assumptions.rates is not None:
        tokens = assumptions.rates.output_tokens
        ends = (min(limit, end) for end in (tokens.low, tokens.mid, tokens.high))
        return Interval(*ends), f"as in the run on {assumptions.rates.device}"
    half = max(1.0, limit / 2)
    return (
        Interval(1.0, half, limit),
        f"assumed 1 to {limit} (max_new_tokens); --output-tokens sets the average",
    )

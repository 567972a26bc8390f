"""Judges trials: speed-ups and quality with intervals, the Pareto front, a recommended setting.

Each block gives one ratio to the uncompressed answers, and blocks are resampled for the interval of
the speed-up. A setting meets a target if its quality does with 90 % confidence (Wilson, 1927). The
fastest of those is recommended if it is faster than no compression with 95 % confidence; otherwise
compression does not pay.

Not covered: settings that the sample is too small to distinguish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gc2ray.core.arguments import check_range
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.format import SECONDS_PER_HOUR
from gc2ray.core.intervals import MeanInterval, interval, ratio
from gc2ray.core.metrics.scores import exact_match, score
from gc2ray.core.records import Answer
from gc2ray.estimation.trials import BASELINE, CompressionSetting, Trials

ONE_SIDED_CONFIDENCE = 0.9


@dataclass(frozen=True)
class Target:
    """The target of a tuning; exactly one of its fields is set.

    Attributes:
        min_agreement: Least share of answers that are the same as uncompressed.
        min_accuracy: Least score against references.
        budget_usd: Largest cost of all rows; the best quality within it is recommended.

    Raises:
        ConfigError: A number is out of range.
    """

    min_agreement: float | None = None
    min_accuracy: float | None = None
    budget_usd: float | None = None

    def __post_init__(self) -> None:
        if self.min_agreement is not None:
            check_range("min_agreement", self.min_agreement, 0, 1)
        if self.min_accuracy is not None:
            check_range("min_accuracy", self.min_accuracy, 0, 1)
        if self.budget_usd is not None:
            check_range("budget_usd", self.budget_usd, 0)


@dataclass(frozen=True)
class Measured:
    """A setting, measured.

    Attributes:
        setting: The setting.
        seconds_per_row: On this device.
        speed_up: Over no compression, with 95 % confidence.
        visual_tokens: Kept of a row.
        agreement: Share of answers that are the same as uncompressed.
        accuracy: Score against references; None without them.
        usd: Cost of all rows; None without a price.
        meets: Whether it meets the target, with 90 % confidence.
        on_front: No other setting is both faster and better.
    """

    setting: CompressionSetting
    seconds_per_row: float
    speed_up: MeanInterval
    visual_tokens: float
    agreement: MeanInterval
    accuracy: MeanInterval | None
    usd: float | None
    meets: bool
    on_front: bool = False

    @property
    def quality(self) -> MeanInterval:
        """Accuracy where it is known, else agreement."""
        return self.accuracy or self.agreement


@dataclass(frozen=True)
class Tuning:
    """The result of a tuning.

    Attributes:
        measured: All settings, uncompressed first.
        recommended: The setting to use; `BASELINE` where compression does not pay, None
            where no setting meets the target.
        verdict: The same in a sentence.
        no_cost: Why there is no cost; None where there is one.
    """

    measured: tuple[Measured, ...]
    recommended: CompressionSetting | None
    verdict: str
    no_cost: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Criteria:
    """The criteria that trials are judged by.

    Attributes:
        target: What a setting has to meet.
        references: Reference answers by row key; empty without references.
        metric: Scores answers against them.
        usd_per_hour: Price of the device; None where it is not known.
        total_rows: Rows of the input.
    """

    target: Target
    references: Mapping[str, Sequence[str]]
    metric: str = "exact_match"
    usd_per_hour: float | None = None
    total_rows: int = 0


def judge(trials: Trials, criteria: Criteria) -> Tuning:
    """Judge trials by a target.

    Raises:
        ConfigError: No answer can be compared.
    """
    measured = tuple(_measured(trials, index, criteria) for index in range(len(trials.settings)))
    measured = tuple(_on_front(item, measured) for item in measured)
    recommended, verdict = _recommended(measured, criteria)
    return Tuning(measured, recommended, verdict)


def _measured(trials: Trials, index: int, criteria: Criteria) -> Measured:
    setting = trials.settings[index]
    ours, theirs = trials.answers[setting.name], trials.answers[BASELINE.name]
    keys = [key for key, answer in theirs.items() if answer.status == Status.OK]
    if not keys:
        raise ConfigError("no row of the sample could be answered uncompressed")
    texts = [_text(ours.get(key)) for key in keys]
    same = [
        0.0 if text is None else exact_match(text, [_text(theirs[key]) or ""])
        for key, text in zip(keys, texts, strict=True)
    ]
    agreement, accuracy = interval(np.array(same)), None
    references = map(criteria.references.get, keys)
    scored = [(text, right) for text, right in zip(texts, references, strict=True) if right]
    if scored:
        values = score(criteria.metric, [t for t, _ in scored], [r for _, r in scored])
        accuracy = None if np.isnan(values).all() else interval(values)
    seconds = float(trials.seconds[:, index].sum() / trials.rows.sum())
    price, kept = criteria.usd_per_hour, [ours[key].visual_tokens_kept or 0 for key in keys]
    usd = None if price is None else seconds * criteria.total_rows / SECONDS_PER_HOUR * price
    return Measured(
        setting=setting,
        seconds_per_row=seconds,
        speed_up=ratio(trials.seconds[:, 0], trials.seconds[:, index]),
        visual_tokens=float(np.mean(kept)),
        agreement=agreement,
        accuracy=accuracy,
        usd=usd,
        meets=_meets(criteria.target, agreement, accuracy, usd),
    )


def _text(answer: Answer | None) -> str | None:
    return answer.answer if answer is not None and answer.status == Status.OK else None


def _meets(
    target: Target, agreement: MeanInterval, accuracy: MeanInterval | None, usd: float | None
) -> bool:
    if target.min_accuracy is not None:
        return accuracy is not None and lower(accuracy) >= target.min_accuracy
    if target.budget_usd is not None:
        return usd is not None and usd <= target.budget_usd
    return lower(agreement) >= (target.min_agreement or 0.0)


def lower(share: MeanInterval) -> float:
    """Lower bound of a share with 90 % confidence, by Wilson."""
    z, n, p = NormalDist().inv_cdf(ONE_SIDED_CONFIDENCE), share.rows, share.mean
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n)


def _rows_needed(share: float) -> int | None:
    """Fewest rows whose `lower` reaches a share if all of them agree; None: no number does."""
    z = NormalDist().inv_cdf(ONE_SIDED_CONFIDENCE)
    return math.ceil(z * z * share / (1 - share)) if share < 1 else None


def _on_front(item: Measured, others: Sequence[Measured]) -> Measured:
    beaten = any(
        other.seconds_per_row <= item.seconds_per_row
        and other.quality.mean >= item.quality.mean
        and (other.seconds_per_row, other.quality.mean) != (item.seconds_per_row, item.quality.mean)
        for other in others
    )
    return replace(item, on_front=not beaten)


def _recommended(
    measured: Sequence[Measured], criteria: Criteria
) -> tuple[CompressionSetting | None, str]:
    good = [item for item in measured if item.meets]
    if not good:
        return None, _why_none(measured, criteria.target)
    if criteria.target.budget_usd is not None:
        chosen = max(good, key=lambda item: (item.quality.mean, -item.seconds_per_row))
    else:
        chosen = min(good, key=lambda item: item.seconds_per_row)
    if chosen.setting == BASELINE or (
        chosen.speed_up.low <= 1 and any(item.setting == BASELINE for item in good)
    ):
        rest = [item for item in good if item.setting != BASELINE]
        if not rest:
            reason = "no compressed setting meets the target with 90 % confidence"
        else:
            fastest = min(rest, key=lambda item: item.seconds_per_row)
            reason = (
                f"the fastest setting that meets the target, {fastest.setting.name}, is "
                f"{fastest.speed_up.mean:.2f} times as fast as no compression "
                f"({fastest.speed_up.low:.2f} to {fastest.speed_up.high:.2f})"
            )
        return BASELINE, f"Compression does not pay here: {reason}."
    speed = chosen.speed_up
    return chosen.setting, (
        f"Use {chosen.setting.name}: {speed.mean:.2f} times as fast as no compression "
        f"({speed.low:.2f} to {speed.high:.2f}), agreement {chosen.agreement}"
        + (f", accuracy {chosen.accuracy}." if chosen.accuracy else ".")
    )


def _why_none(measured: Sequence[Measured], target: Target) -> str:
    """Why no setting meets the target, and what to do."""
    if target.min_agreement is not None:  # no compression agrees with itself in every row
        needed, share = _rows_needed(target.min_agreement), f"{target.min_agreement:g}"
        if needed is None:
            return f"No sample shows an agreement of {share}; choose a lower --min-agreement."
        return (
            f"{measured[0].agreement.rows} answers are too few to show an agreement of {share} "
            f"with 90 % confidence: it takes {needed} that all agree. Choose more --rows, where "
            "the input has them, or a lower --min-agreement."
        )
    if target.budget_usd is not None:
        cheapest = min(measured, key=lambda item: item.seconds_per_row).setting.name
        return f"No setting answers all rows for that; the cheapest is {cheapest}."
    best = max(measured, key=lambda item: lower(item.quality))
    return (
        "No setting meets the target with 90 % confidence, uncompressed or not; the best is "
        f"{best.setting.name} with {best.quality}. Choose more --rows, or a lower --min-accuracy."
    )

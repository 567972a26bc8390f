"""What trials say: speed-ups and quality with their intervals, the front, the setting to take.

Each block gives one ratio to the uncompressed answers, and blocks are resampled for the interval of
the speed-up. A setting meets a target where its quality does with 90 % confidence (Wilson, 1927).
Recommended is the fastest of those that do, if it is faster than no compression for sure; else it
is said that compression does not pay.

Not covered: settings that no sample can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.intervals import MeanInterval, interval, ratio
from gc2ray.core.metrics.scores import exact_match, score
from gc2ray.core.records import Answer

ONE_SIDED_90 = NormalDist().inv_cdf(0.9)
"""Standard deviations."""


@dataclass(frozen=True)
class CompressionSetting:
    """A method at a retention.

    Attributes:
        method: Of compression.
        retention: The fraction KEPT, nominal.
    """

    method: str
    retention: float

    @property
    def name(self) -> str:
        """Of the way that an engine knows it by."""
        return f"{self.method} at {self.retention:g}"

    def config(self, own: CompressionConfig) -> CompressionConfig:
        """The recipe's compression with this setting."""
        return own.model_copy(update={"method": self.method, "retention": self.retention})


WHOLE = CompressionSetting("none", 1.0)
"""What everything is compared with."""


@dataclass(frozen=True, eq=False)
class Trials:
    """What was measured.

    Attributes:
        settings: Those of the columns, uncompressed first.
        seconds: Of each block in each setting, (B, S).
        rows: Of each block, (B,).
        answers: By setting's name and row key.
    """

    settings: tuple[CompressionSetting, ...]
    seconds: np.ndarray
    rows: np.ndarray
    answers: Mapping[str, Mapping[str, Answer]]


@dataclass(frozen=True)
class Target:
    """What is asked of a setting; exactly one of them.

    Attributes:
        min_agreement: Share of answers that are the same as uncompressed.
        min_accuracy: Score against references.
        budget_usd: Cost of all rows; then the best quality is wanted.
    """

    min_agreement: float | None = None
    min_accuracy: float | None = None
    budget_usd: float | None = None


@dataclass(frozen=True)
class Measured:
    """A setting, measured.

    Attributes:
        setting: Which.
        seconds_per_row: On this device.
        speed_up: Over no compression, with 95 % confidence.
        visual_tokens: Kept of a row.
        agreement: Share of answers that are the same as uncompressed.
        accuracy: Score against references; None without them.
        usd: Of all rows; None without a price.
        meets: The target, for sure.
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
    """What comes of it.

    Attributes:
        measured: All settings, uncompressed first.
        recommended: What to take; `WHOLE` where compression does not pay, None where no setting
            meets the target.
        verdict: The same in a sentence.
    """

    measured: tuple[Measured, ...]
    recommended: CompressionSetting | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TuneQuestion:
    """What a tuning is to find out.

    Attributes:
        target: What is asked of a setting.
        references: Right answers by row key; none where there are none.
        metric: How answers are scored against them.
        usd_per_hour: Of the device; None where nobody tells.
        total_rows: Of the input.
    """

    target: Target
    references: Mapping[str, Sequence[str]]
    metric: str = "exact_match"
    usd_per_hour: float | None = None
    total_rows: int = 0


def judge(trials: Trials, question: TuneQuestion) -> Tuning:
    """What trials say of a target.

    Raises:
        ConfigError: No answer can be compared.
    """
    found = tuple(_measured(trials, place, question) for place in range(len(trials.settings)))
    fronted = tuple(_fronted(item, found) for item in found)
    recommended, verdict = _recommended(fronted, question)
    return Tuning(fronted, recommended, verdict)


def _measured(trials: Trials, place: int, question: TuneQuestion) -> Measured:
    setting = trials.settings[place]
    ours, theirs = trials.answers[setting.name], trials.answers[WHOLE.name]
    keys = [key for key, answer in theirs.items() if answer.status == Status.OK]
    if not keys:
        raise ConfigError("no row of the sample could be answered uncompressed")
    texts = [_text(ours.get(key)) for key in keys]
    same = [
        0.0 if text is None else exact_match(text, [_text(theirs[key]) or ""])
        for key, text in zip(keys, texts, strict=True)
    ]
    agreement, accuracy = interval(np.array(same)), None
    known = [(text, question.references.get(key)) for key, text in zip(keys, texts, strict=True)]
    scored = [(text, right) for text, right in known if right]
    if scored:
        values = score(question.metric, [t for t, _ in scored], [r for _, r in scored])
        accuracy = None if np.isnan(values).all() else interval(values)
    seconds = float(trials.seconds[:, place].sum() / trials.rows.sum())
    price, kept = question.usd_per_hour, [ours[key].visual_tokens_kept or 0 for key in keys]
    usd = None if price is None else seconds * question.total_rows / 3600 * price
    return Measured(
        setting=setting,
        seconds_per_row=seconds,
        speed_up=ratio(trials.seconds[:, 0], trials.seconds[:, place]),
        visual_tokens=float(np.mean(kept)),
        agreement=agreement,
        accuracy=accuracy,
        usd=usd,
        meets=_meets(question.target, agreement, accuracy, usd),
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


def lower(found: MeanInterval) -> float:
    """What a share is at least, with 90 % confidence: Wilson's bound."""
    z, n, p = ONE_SIDED_90, found.rows, found.mean
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n)


def _fronted(item: Measured, others: Sequence[Measured]) -> Measured:
    beaten = any(
        other.seconds_per_row <= item.seconds_per_row
        and other.quality.mean >= item.quality.mean
        and (other.seconds_per_row, other.quality.mean) != (item.seconds_per_row, item.quality.mean)
        for other in others
    )
    return replace(item, on_front=not beaten)


def _recommended(
    found: Sequence[Measured], question: TuneQuestion
) -> tuple[CompressionSetting | None, str]:
    good = [item for item in found if item.meets]
    if not good:
        best = max(found, key=lambda item: lower(item.quality))
        return None, (
            "No setting meets the target for sure, uncompressed or not; the best is "
            f"{best.setting.name} with {best.quality}. More --rows may tell."
        )
    if question.target.budget_usd is not None:
        chosen = max(good, key=lambda item: (item.quality.mean, -item.seconds_per_row))
    else:
        chosen = min(good, key=lambda item: item.seconds_per_row)
    if chosen.setting == WHOLE or (
        chosen.speed_up.low <= 1 and any(item.setting == WHOLE for item in good)
    ):
        rest = [item for item in good if item.setting != WHOLE]
        if not rest:
            told = "no compressed setting meets the target for sure"
        else:
            fastest = min(rest, key=lambda item: item.seconds_per_row)
            told = (
                f"of those that meet the target the fastest, {fastest.setting.name}, is "
                f"{fastest.speed_up.mean:.2f} times as fast as no compression "
                f"({fastest.speed_up.low:.2f} to {fastest.speed_up.high:.2f})"
            )
        return WHOLE, f"Compression does not pay here: {told}."
    speed = chosen.speed_up
    return chosen.setting, (
        f"Take {chosen.setting.name}: {speed.mean:.2f} times as fast as no compression "
        f"({speed.low:.2f} to {speed.high:.2f}), agreement {chosen.agreement}"
        + (f", accuracy {chosen.accuracy}." if chosen.accuracy else ".")
    )

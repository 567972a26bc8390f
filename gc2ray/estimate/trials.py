"""Which retention, and which method, pays here: measured on the user's own rows and device.

One engine answers a sample of the rows in every setting, block by block, the settings of a block in
a drawn order and those of the next in its reverse, so that what drifts meets all alike. Time is
the wall clock of a block, reading and decoding images included, as in a run. Each block gives one
ratio to the uncompressed answers, and blocks are resampled for the interval of the speed-up.

A setting meets a target where its quality does with 90 % confidence (Wilson, 1927). Recommended is
the fastest of those that do, if it is faster than no compression for sure; else it is said that
compression does not pay.

Not covered: settings that no sample can tell apart; several workers that take from each other.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from gc2ray.core.config.job import CompressionConfig
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.records import UNCOMPRESSED, Answer, Request
from gc2ray.core.scores import Interval, exact_match, interval, ratio, score

RETENTIONS = (0.75, 0.5, 0.25, 0.1, 0.05)
BLOCKS = 8
ONE_SIDED_90 = 1.2816
"""Standard deviations."""


class Answering(Protocol):
    """What is needed of an engine that knows the settings as ways."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """As `gc2ray.engine.engine.Engine.stream`."""

    def forget(self) -> None:
        """As `gc2ray.engine.engine.Engine.forget`."""


@dataclass(frozen=True)
class Setting:
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


WHOLE = Setting("none", 1.0)
"""What everything is compared with."""


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


@dataclass(frozen=True, eq=False)
class Trials:
    """What was measured.

    Attributes:
        settings: Those of the columns, uncompressed first.
        seconds: Of each block in each setting, (B, S).
        rows: Of each block, (B,).
        answers: By setting's name and row key.
    """

    settings: tuple[Setting, ...]
    seconds: np.ndarray
    rows: np.ndarray
    answers: Mapping[str, Mapping[str, Answer]]


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

    setting: Setting
    seconds_per_row: float
    speed_up: Interval
    visual_tokens: float
    agreement: Interval
    accuracy: Interval | None
    usd: float | None
    meets: bool
    on_front: bool = False

    @property
    def quality(self) -> Interval:
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
    recommended: Setting | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
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


def measure(
    engine: Answering,
    requests: Sequence[Request],
    settings: Sequence[Setting],
    *,
    blocks: int = BLOCKS,
    clock: Callable[[], float] = time.perf_counter,
) -> Trials:
    """Answer requests in every setting, interleaved.

    Args:
        engine: Knows each setting as a way with its name.
        requests: Of the sample; faults are left out.
        settings: Beside no compression.
        blocks: Parts of the sample; at least two rows each.
        clock: In seconds.

    Raises:
        ConfigError: There are too few rows.
    """
    asked = [request for request in requests if request.fault is None]
    count = min(blocks, len(asked) // 2)
    if count < 2:
        raise ConfigError(f"--rows: {len(asked)} rows that can be answered are too few to compare")
    parts = [asked[part::count] for part in range(count)]
    every = (WHOLE, *(setting for setting in settings if setting != WHOLE))
    draw = random.Random(0)  # noqa: S311 - an order, not a secret
    seconds = np.zeros((count, len(every)))
    answers: dict[str, dict[str, Answer]] = {setting.name: {} for setting in every}
    for setting in every:  # warms up
        _answered(engine, parts[0], setting)
    order: list[int] = []
    for block, part in enumerate(parts):
        # There and back again: of two blocks together no setting came first on average.
        order = order[::-1] if block % 2 else draw.sample(range(len(every)), len(every))
        for place in order:
            engine.forget()
            started = clock()
            found = _answered(engine, part, every[place])
            seconds[block, place] = clock() - started
            answers[every[place].name] |= {answer.request.row_key: answer for answer in found}
    return Trials(every, seconds, np.array([len(part) for part in parts]), answers)


def _answered(engine: Answering, part: Sequence[Request], setting: Setting) -> list[Answer]:
    way = UNCOMPRESSED if setting == WHOLE else setting.name
    return list(engine.stream(replace(request, way=way) for request in part))


def judge(trials: Trials, question: Question) -> Tuning:
    """What trials say of a target.

    Raises:
        ConfigError: No answer can be compared.
    """
    found = tuple(_measured(trials, place, question) for place in range(len(trials.settings)))
    fronted = tuple(_fronted(item, found) for item in found)
    recommended, verdict = _recommended(fronted, question)
    return Tuning(fronted, recommended, verdict)


def _measured(trials: Trials, place: int, question: Question) -> Measured:
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
    target: Target, agreement: Interval, accuracy: Interval | None, usd: float | None
) -> bool:
    if target.min_accuracy is not None:
        return accuracy is not None and lower(accuracy) >= target.min_accuracy
    if target.budget_usd is not None:
        return usd is not None and usd <= target.budget_usd
    return lower(agreement) >= (target.min_agreement or 0.0)


def lower(found: Interval) -> float:
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


def _recommended(found: Sequence[Measured], question: Question) -> tuple[Setting | None, str]:
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


def references_of(requests: Sequence[Request], column: str) -> dict[str, list[str]]:
    """Right answers by row key, from a column that the recipe keeps: text, or a list of texts."""

    def texts(value: Any) -> list[str]:
        plain = value.as_py() if hasattr(value, "as_py") else value
        values = plain if isinstance(plain, list) else [plain]
        return [str(item) for item in values if item is not None]

    return {
        request.row_key: texts(request.carried[column])
        for request in requests
        if column in request.carried
    }

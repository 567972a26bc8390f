"""Numbers that are not known exactly, and confidence intervals by bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number that is not known exactly, with the bounds that it lies within.

    Attributes:
        low: The lower bound, by arithmetic or with 95 % confidence.
        mid: The best estimate.
        high: The upper bound.
    """

    low: float
    mid: float
    high: float

    @staticmethod
    def exactly(value: float) -> Interval:
        """A number that is known exactly."""
        return Interval(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether both bounds are the same."""
        return self.low == self.high

    @property
    def ends(self) -> tuple[float, float, float]:
        """Lower bound, best estimate, upper bound."""
        return self.low, self.mid, self.high

    def times(self, other: Interval) -> Interval:
        """The product of two intervals that are not negative."""
        return Interval(self.low * other.low, self.mid * other.mid, self.high * other.high)

    def scaled(self, factor: float) -> Interval:
        """A multiple of the interval."""
        return self.times(Interval.exactly(factor))

    def plus(self, other: Interval) -> Interval:
        """The sum of two intervals."""
        return Interval(self.low + other.low, self.mid + other.mid, self.high + other.high)


@dataclass(frozen=True)
class MeanInterval(Interval):
    """A mean or a ratio over rows, and where it lies with 95 % confidence.

    Attributes:
        rows: Rows, or groups of rows, that it was computed from.
    """

    rows: int

    def __str__(self) -> str:
        return f"{self.mid:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def mean(self) -> float:
        """The estimate of the mean, as `mid`."""
        return self.mid


def interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> MeanInterval:
    """The mean of values with its bootstrap interval; NaN are left out.

    Rows with equal values are interchangeable, so resamples are drawn as counts of the distinct
    values: a million rows take no longer than a thousand.

    Raises:
        ValueError: There are no values.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("no rows to take a mean of")
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        len(values), counts / len(values), size=resamples
    )
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return MeanInterval(float(low), float(values.mean()), float(high), len(values))


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> MeanInterval:
    """The sum of one measure divided by the sum of another, over groups of similar rows.

    Groups are resampled with both of their measures. Few groups make a bootstrap too narrow, so it
    is widened by sqrt(n / (n - 1)). A single group says nothing about others: its interval is
    unbounded.

    Args:
        above: The numerator of each group, float64 (G,).
        below: The denominator of each group, float64 (G,); their sum is above 0.
        seed: Seed of the resamples.

    Raises:
        ValueError: There are no groups, or nothing to divide by.
    """
    groups = len(above)
    if not groups or below.sum() <= 0:
        raise ValueError("no rows to take a ratio of")
    mean = float(above.sum() / below.sum())
    if groups == 1:
        return MeanInterval(-np.inf, mean, np.inf, groups)
    drawn = np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=RESAMPLES
    )
    ratios = (drawn @ above) / np.maximum(drawn @ below, np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wide = np.sqrt(groups / (groups - 1))
    return MeanInterval(
        float(mean - wide * (mean - low)), mean, float(mean + wide * (high - mean)), groups
    )


def difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> MeanInterval:
    """Mean of ours minus theirs on the same rows, paired.

    Raises:
        ValueError: They are not of one length.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} rows cannot be paired")
    return interval(ours - theirs, seed)

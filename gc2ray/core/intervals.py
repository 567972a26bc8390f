"""Numbers that are not known to the last digit, and confidence intervals by bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over rows, and where it lies with 95% confidence."""

    mean: float
    low: float
    high: float
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is distinguishable from none."""
        return self.low > 0 or self.high < 0


def interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of values with its bootstrap interval; NaN are left out.

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
    return Interval(float(values.mean()), float(low), float(high), len(values))


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Interval:
    """Sum of one measure over the sum of another, of groups of rows that are alike within.

    Groups are resampled, both measures together; as few groups make a bootstrap too narrow, it is
    widened by sqrt(n / (n - 1)). One group says nothing of others: its interval has no end.

    Args:
        above: By group, float64 (G,).
        below: Likewise; its sum is above 0.
        seed: Of the resamples.

    Raises:
        ValueError: There are no groups, or nothing to divide by.
    """
    groups = len(above)
    if not groups or below.sum() <= 0:
        raise ValueError("no rows to take a ratio of")
    mean = float(above.sum() / below.sum())
    if groups == 1:
        return Interval(mean, -np.inf, np.inf, groups)
    drawn = np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=RESAMPLES
    )
    ratios = (drawn @ above) / np.maximum(drawn @ below, np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wide = np.sqrt(groups / (groups - 1))
    return Interval(
        mean, float(mean - wide * (mean - low)), float(mean + wide * (high - mean)), groups
    )


def difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Interval:
    """Mean of ours minus theirs on the same rows, paired.

    Raises:
        ValueError: They are not of one length.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} rows cannot be paired")
    return interval(ours - theirs, seed)


@dataclass(frozen=True)
class Range:
    """A number that is not known to the last digit.

    Attributes:
        low: With 95 % confidence, or by arithmetic, it is at least this.
        mid: The best guess.
        high: At most this.
    """

    low: float
    mid: float
    high: float

    @staticmethod
    def exactly(value: float) -> Range:
        """A number that is known."""
        return Range(value, value, value)

    @property
    def is_exact(self) -> bool:
        """Whether it is known."""
        return self.low == self.high

    def times(self, other: Range) -> Range:
        """The product of two that are not negative."""
        return Range(self.low * other.low, self.mid * other.mid, self.high * other.high)

    def scaled(self, factor: float) -> Range:
        """So many times it."""
        return self.times(Range.exactly(factor))

    def plus(self, other: Range) -> Range:
        """The sum."""
        return Range(self.low + other.low, self.mid + other.mid, self.high + other.high)

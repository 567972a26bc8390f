"""How answers agree with references or with other answers, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gc2ray.core.intervals import MeanInterval, interval
from gc2ray.core.metrics.scores import METRICS, exact_match, score

ALL = "all"
"""Name of the group of all rows."""


@dataclass(frozen=True)
class Agreement:
    """How often two runs gave the same answer.

    Attributes:
        same: Over the rows of both, by exact match; a row that failed in one agrees with nothing.
        differing: Their keys, in order.
        only_first: Rows that only the first run has.
        only_second: Likewise.
    """

    same: MeanInterval
    differing: tuple[str, ...]
    only_first: int
    only_second: int


def agreement(first: Mapping[str, str | None], second: Mapping[str, str | None]) -> Agreement:
    """Compare two runs row by row.

    Args:
        first: Answer by row key, None where the row failed.
        second: Likewise.

    Raises:
        ValueError: They have no row in common.
    """
    shared = sorted(first.keys() & second.keys())
    pairs = [(key, first[key], second[key]) for key in shared]
    marks = [a is not None and b is not None and bool(exact_match(a, [b])) for _, a, b in pairs]
    return Agreement(
        same=interval(np.array(marks, dtype=np.float64)),
        differing=tuple(key for key, mark in zip(shared, marks, strict=True) if not mark),
        only_first=len(first.keys() - second.keys()),
        only_second=len(second.keys() - first.keys()),
    )


def evaluate(
    answers: Sequence[str | None],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] = (),
    metrics: Sequence[str] = tuple(METRICS),
) -> dict[str, dict[str, MeanInterval]]:
    """Every metric over all rows (group `ALL`), and over the rows of each group.

    Args:
        answers: As in `score`.
        references: As in `score`.
        groups: One name for each row, or none at all.
        metrics: Keys of `METRICS`.

    Returns:
        Group to metric to interval; a metric that applies to no row of a group is left out.

    Raises:
        ValueError: A row has no reference, or lengths differ.
    """
    labels = np.array(list(groups) or [ALL] * len(answers))
    if len(labels) != len(answers):
        raise ValueError(f"{len(answers)} rows have {len(labels)} groups")
    found: dict[str, dict[str, MeanInterval]] = {}
    for metric in metrics:
        values = score(metric, answers, references)
        parts = {ALL: values} | {str(name): values[labels == name] for name in np.unique(labels)}
        for name, part in parts.items():
            if not np.isnan(part).all():
                found.setdefault(name, {})[metric] = interval(part)
    return found

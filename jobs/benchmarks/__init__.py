"""Benchmarks, one file each: `run` returns the lines of its table.

To add one: a file with a `run`, a line in `jobs.bench.BENCHMARKS`. This module imports no model
library, because the workers of `job_noop` import it and their start is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line of the table: what was measured, its figures by name, and what became of the goal."""

    what: str
    figures: dict[str, float]
    goal: str = ""


def goal(text: str, *, met: bool) -> str:
    """A goal, and whether it was met."""
    return f"{text}: {'met' if met else 'missed'}"

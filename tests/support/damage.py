"""An output to be damaged, and what `verify` finds in it."""

from __future__ import annotations

from pathlib import Path

from gc2ray.output.verify import verify
from tests.support.outputs import first_plan

PLAN = first_plan()
"""17 rows in 7 shards: 0 to 4 of a.parquet in 2, 5 to 9 in 2, of d/b.parquet in 3."""
SECOND = PLAN.shards[1]


def second(output: Path) -> Path:
    return output / SECOND.part_name


def found(output: Path, *, deep: bool) -> tuple[str, ...]:
    verdict = verify(str(output), deep=deep)
    assert verdict.exit_code == (1 if verdict.problems else 0)
    return verdict.problems

"""Fair timing: what is compared runs in turn in one process, so that drift hits all of it.

What takes long says on stderr how long it took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Work = Callable[[], object]
SLOW_SECONDS = 3.0


@dataclass(frozen=True)
class Times:
    """Seconds of each turn: on the clock, and of this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def in_turn(
    works: Mapping[str, Work], turns: int, calls: int = 1, check: Work | None = None
) -> dict[str, Times]:
    """Time each work once per turn, as the mean of `calls`; every turn starts with another one.

    Args:
        works: What is compared, by name.
        turns: Times that each is timed.
        calls: Times that each runs in a turn.
        check: Called after the first turn; what it raises saves the others' time.
    """
    names = list(works)
    times = {name: Times() for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                works[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            times[name].wall.append(wall / calls)
            times[name].cpu.append(cpu / calls)
            tell(name, wall)
        if check is not None and turn == 0:
            check()
    return times


def tell(name: str, seconds: float) -> None:
    """Say on stderr how long something took, if it was long."""
    if seconds > SLOW_SECONDS:
        print(f"  {name}: {seconds:.0f} s", file=sys.stderr, flush=True)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a turn."""
    return median(a / b for a, b in zip(above, below, strict=True))


def time_ratios(slow: Times, fast: Times) -> dict[str, float]:
    """How many times as long one takes as the other, by the clock and by CPU time."""
    return {
        "ratio_wall": median_ratio(slow.wall, fast.wall),
        "ratio_cpu": median_ratio(slow.cpu, fast.cpu),
    }

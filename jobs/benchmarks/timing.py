"""Fair timing: what is compared runs in turn in one process, so that drift hits all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Work = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of each turn: on the clock, and of this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def in_turn(works: Mapping[str, Work], turns: int, calls: int = 1) -> dict[str, Times]:
    """Time each work once per turn, as the mean of `calls`; every turn starts with another one."""
    names = list(works)
    times = {name: Times() for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                works[name]()
            times[name].wall.append((time.perf_counter() - wall) / calls)
            times[name].cpu.append((time.process_time() - cpu) / calls)
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios within a turn."""
    return median(a / b for a, b in zip(above, below, strict=True))

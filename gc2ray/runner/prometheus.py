"""`RunMetrics`: counters of committed parts, which Prometheus scrapes from every node of Ray.

Every committed part is counted once, with the statistics of its footer, so that the sum over
workers is the sum over footers. A part that lost a race is not counted. The last part of a process
that dies between commit and count is missing here; the footers have it.

Ray adds `ray_` to the names, and the labels of node and worker.

Not covered: dashboards; progress between two parts.
"""

from __future__ import annotations

from ray.util.metrics import Counter

from gc2ray.core.stats import RunStats

SECOND = 1e9


class RunMetrics:
    """Counters of one worker process.

    Args:
        run: Fingerprint of the recipe, a label of every counter.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._shards = _counter("shards", "Committed shards.")
        self._answers = _counter("answers", "Answers by status; all but ok are errors.", "status")
        self._visual = _counter(
            "visual_tokens",
            "Visual tokens by fate: kept, or saved by compression.",
            "fate",
        )
        self._output = _counter("output_tokens", "Generated tokens.")
        self._stages = _counter("stage_seconds", "Busy seconds by stage.", "stage")
        self._input_starved = _counter(
            "input_starved_seconds",
            "Seconds that a worker waited for input while rows remained.",
        )

    def count(self, stats: RunStats) -> None:
        """Add the statistics of a committed part."""
        self._add(self._shards, 1)
        self._add(self._output, stats.output_tokens)
        self._add(self._input_starved, stats.input_starved_ns / SECOND)
        kept = stats.visual_tokens_kept
        self._add(self._visual, kept, fate="kept")
        self._add(self._visual, stats.visual_tokens_full - kept, fate="saved")
        for status, rows in stats.by_status.items():
            self._add(self._answers, rows, status=status)
        for stage, nanoseconds in stats.stage_ns.items():
            self._add(self._stages, nanoseconds / SECOND, stage=stage)

    def _add(self, counter: Counter, value: float, **labels: str) -> None:
        if value > 0:  # Ray refuses to add 0
            counter.inc(value, {"run": self._run, **labels})


def _counter(name: str, description: str, *labels: str) -> Counter:
    return Counter(f"gc2ray_{name}", description, ("run", *labels))

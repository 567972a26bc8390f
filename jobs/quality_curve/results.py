"""What was measured on a model, as the parts of its document: intervals and paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gc2ray.core.intervals import MeanInterval, difference, interval
from gc2ray.demo.questions import TOPICS
from gc2ray.demo.rows import DemoRow
from gc2ray.estimation.retentions import TUNED_RETENTIONS
from jobs.quality_curve import downsample
from jobs.quality_curve.controls import ForeignScores
from jobs.quality_curve.models import PAPERS_PACKING
from jobs.quality_curve.plan import PACKED, Plan
from jobs.quality_curve.points import CONTROLS, Measured, Point

Line = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Results:
    """What was measured.

    Attributes:
        plan: What was to be.
        rows: The rows that were answered.
        measured: By point.
        right: By point, 1 for rows that were answered right, float64 (rows,).
    """

    plan: Plan
    rows: Sequence[DemoRow]
    measured: Mapping[Point, Measured]
    right: Mapping[Point, np.ndarray]

    def curve(self) -> list[Line]:
        """Methods and controls at their retentions, in the paper's packing."""
        methods = self.plan.model.methods
        named = [(method, 1.0) for method in methods] + [("thumbnail", 1.0), (downsample.NAME, 1.0)]
        named += [(method, r) for r in TUNED_RETENTIONS for method in (*methods, downsample.NAME)]
        named += [(name, 0.1) for name in CONTROLS]
        return [
            {"method": method, "retention": r, **self._line(self.plan.point(method, r))}
            for method, r in named
        ]

    def differences(self) -> list[Line]:
        """`globalcom2` and the others, foreign scores and `random`, on the same rows.

        Against `local`, which differs by the thumbnail's guidance alone, also by crop grid.
        """
        return [
            {"name": name, "retention": r, **found}
            for r in self.plan.model.low
            for name, found in self._differences_at(r)
        ]

    def _differences_at(self, retention: float) -> Iterator[tuple[str, Line]]:
        for other in (*self.plan.model.methods[1:], downsample.NAME):
            name = f"`globalcom2` - `{other}`"
            yield name, self._between(("globalcom2", retention), (other, retention))
            if other == "local":
                for remark, chosen in self._grids():
                    pair = ("globalcom2", retention), (other, retention)
                    yield f"{name}, {remark}", self._between(*pair, chosen)
        if retention == 0.1:
            pair = (ForeignScores.name, retention), ("random", retention)
            yield f"`{ForeignScores.name}` - `random`", self._between(*pair)
        yield "`globalcom2` - uncompressed", self._between(("globalcom2", retention), ("none", 1.0))

    def _grids(self) -> Iterator[tuple[str, np.ndarray]]:
        """Which rows have a grid of each kind."""
        model = self.plan.model
        found = [model.cropping.grid(row.scene.size) for row in self.rows]
        for remark, grids in model.grids.items():
            if (chosen := np.array([grid in grids for grid in found])).any():
                yield remark, chosen

    def topics(self) -> dict[str, dict[str, float]]:
        """Exact match by topic."""
        topics = np.array([row.question.topic for row in self.rows])
        shown = {
            "uncompressed": ("none", 1.0),
            **{f"`globalcom2` at {r:g}": ("globalcom2", r) for r in PACKED},
            **{
                f"`{method}` at 0.1": (method, 0.1)
                for method in self.plan.model.methods
                if not method.startswith("globalcom2")
            },
            "`thumbnail`": ("thumbnail", 1.0),
            "foreign scores at 0.1": ("foreign scores", 0.1),
            "no image": ("no image", 0.1),
        }
        table = {}
        for label, key in shown.items():
            right = self.right[self.plan.point(*key)]
            by_topic = {topic: float(right[topics == topic].mean()) for topic in TOPICS}
            table[label] = {"all": float(right.mean()), **by_topic}
        table["most common answer"] = _chance(self.rows, topics)
        return table

    def packings(self) -> list[Line]:
        """`globalcom2` packed in every way, and what that changes against the paper's way."""
        where = np.array([row.question.topic == "where" for row in self.rows])
        lines = []
        for point in self.plan.packings():
            right = self.right[point]
            line: Line = {
                "positions": point.positions,
                "newlines": point.newlines,
                "retention": point.retention,
                **self._line(point),
                "where": float(right[where].mean()),
            }
            if (point.positions, point.newlines) != PAPERS_PACKING:
                papers = self.right[self.plan.point("globalcom2", point.retention)]
                line["difference"] = plain(difference(right, papers))
                line["where_difference"] = plain(difference(right[where], papers[where]))
            lines.append(line)
        return lines

    def markers(self) -> list[Line]:
        """`thumbnail` with all markers, and with those of views that keep a token."""
        lines = []
        for point in self.plan.markers():
            line: Line = {"markers": point.markers, **self._line(point)}
            if point.markers != "all":
                every = self.right[self.plan.point("thumbnail")]
                line["difference"] = plain(difference(self.right[point], every))
            lines.append(line)
        return lines

    def several(self) -> list[Line]:
        """Rows of two images: uncompressed, and by whether they share a budget."""
        lines = []
        for point in self.plan.several():
            line: Line = {"budget": point.budget, "retention": point.retention}
            line |= {"rows": len(self.right[point]), **self._line(point)}
            if point.budget == "row":
                own = self.right[replace(point, budget="image")]
                line["difference"] = plain(difference(self.right[point], own))
            lines.append(line)
        return lines

    def scores(self) -> list[Line]:
        """Every score by `globalcom2` and `local`: against the paper's, and against each other."""
        plan, lines = self.plan, []
        for point in plan.scores():
            score = point.score or plan.default_score
            line: Line = {"score": score, "method": point.method, "retention": point.retention}
            line |= self._line(point)
            if score != plan.model.scores[0]:
                papers = plan.point(point.method, point.retention, plan.model.scores[0])
                line["difference"] = plain(difference(self.right[point], self.right[papers]))
            if point.method == "globalcom2":
                local = plan.point("local", point.retention, score)
                line["guidance"] = plain(difference(self.right[point], self.right[local]))
            lines.append(line)
        return lines

    def downsampled(self) -> list[Line]:
        """Smaller images against `globalcom2` at about the tokens that they really take."""
        lines = []
        for retention in TUNED_RETENTIONS:
            smaller = self.plan.point(downsample.NAME, retention)
            ours = self._reading_no_more_than(self.measured[smaller].prompt_tokens)
            line = {"retention": retention, **self._line(smaller)}
            line["fitting"] = self.measured[smaller].fitting
            line["globalcom2"] = {"retention": ours.retention, **self._line(ours)}
            line["difference"] = plain(difference(self.right[ours], self.right[smaller]))
            lines.append(line)
        return lines

    def _reading_no_more_than(self, tokens: float) -> Point:
        """The highest retention of `globalcom2` with prompts of so many tokens; else the lowest."""
        points = [self.plan.point("globalcom2", r) for r in TUNED_RETENTIONS]
        fitting = [point for point in points if self.measured[point].prompt_tokens <= tokens]
        return fitting[0] if fitting else points[-1]

    def _between(
        self,
        ours: tuple[str, float],
        theirs: tuple[str, float],
        chosen: np.ndarray | slice = slice(None),
    ) -> Line:
        first, second = (self.right[self.plan.point(*named)] for named in (ours, theirs))
        return plain(difference(first[chosen], second[chosen]))

    def _line(self, point: Point) -> Line:
        measured = self.measured[point]
        tokens = {"tokens": measured.tokens, "prompt_tokens": measured.prompt_tokens}
        return {**tokens, **plain(interval(self.right[point]))}


def plain(found: MeanInterval) -> dict[str, float]:
    """An interval as numbers of a document."""
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _chance(rows: Sequence[DemoRow], topics: np.ndarray) -> dict[str, float]:
    """What saying the commonest answer of a topic, always, would get."""
    answers = np.array([row.question.answer for row in rows])
    counts = {t: np.unique(answers[topics == t], return_counts=True)[1].max() for t in TOPICS}
    shares = {t: float(counts[t] / (topics == t).sum()) for t in TOPICS}
    return {"all": float(sum(counts.values()) / len(rows)), **shares}

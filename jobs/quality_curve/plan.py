"""Which points are measured on a model, and how each is named again when it is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gc2ray.core.config.compression import Score
from gc2ray.estimation.retentions import TUNED_RETENTIONS
from jobs.quality_curve import downsample
from jobs.quality_curve.controls import ForeignScores
from jobs.quality_curve.models import PAPERS_PACKING, DemoModel
from jobs.quality_curve.points import CONTROLS, TEMPERATURE, Point

PACKED = (0.25, 0.1, 0.05)
"""Retentions at which policies of packing are compared, by `globalcom2`."""
GUIDED = ("globalcom2", "globalcom2-reference", ForeignScores.name)
"""What reads the temperature."""
SEVERAL, SEVERAL_AT = 2, (0.25, 0.1)
"""Images of a row where several are measured, and the retentions."""
NOT_WHOLE = ("globalcom2-reference", "thumbnail")
"""What drops tokens at 1.0 too; there every other method is the identity."""


@dataclass(frozen=True)
class Plan:
    """The points of a model.

    Attributes:
        model: The model.
        temperatures: The temperature that is used with each score.
    """

    model: DemoModel
    temperatures: Mapping[Score, float]

    @property
    def default_score(self) -> Score:
        """The score that the model has where none is asked for."""
        return self.model.default_score

    def point(
        self, method: str, retention: float = 1.0, score: Score | None = None, **others: Any
    ) -> Point:
        """A method at a retention, with its score's temperature and others of its settings."""
        if retention == 1.0 and method not in NOT_WHOLE:
            return Point("none", images=others.get("images", 1))
        chosen = score or self.default_score
        temperature = self.temperatures[chosen] if method in GUIDED else TEMPERATURE
        named = None if chosen == self.default_score else chosen
        return Point(method, retention, temperature, score=named, **others)

    def points(self) -> list[Point]:
        """All of them, those of one score together."""
        planned = [self.point("none"), self.point("thumbnail")]
        planned += [self.point(method) for method in self.model.methods]
        curves = (*self.model.methods, downsample.NAME)
        planned += [self.point(method, r) for r in TUNED_RETENTIONS for method in curves]
        planned += [self.point(name, 0.1) for name in CONTROLS]
        planned += self.packings() + self.markers() + self.several() + self.scores()
        return list(dict.fromkeys(planned))

    def packings(self) -> list[Point]:
        """`globalcom2` in every packing; the paper's is the first of each retention."""
        return [
            self.point("globalcom2", r, positions=positions, newlines=newlines)
            for r in PACKED
            for positions, newlines in (PAPERS_PACKING, *self.model.packings)
        ]

    def markers(self) -> list[Point]:
        """The only method that can leave a view without a token, with all markers and fewer."""
        if not self.model.has_markers:
            return []
        return [self.point("thumbnail"), self.point("thumbnail", markers="kept_views")]

    def several(self) -> list[Point]:
        """Rows of two images, with budgets of their own and one that they share."""
        return [
            self.point("none", images=SEVERAL),
            *(
                self.point("globalcom2", r, images=SEVERAL, budget=budget)
                for r in SEVERAL_AT
                for budget in ("image", "row")
            ),
        ]

    def scores(self) -> list[Point]:
        """Every score, with the thumbnail's guidance and without."""
        return [
            self.point(method, r, score)
            for score in self.model.scores
            for r in self.model.low
            for method in ("globalcom2", "local")
        ]

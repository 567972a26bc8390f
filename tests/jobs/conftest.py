"""Training short enough for tests, and stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from gc2ray.demo.rows import DemoRow
from jobs.quality_curve.points import Point
from jobs.quality_curve.several import rows_with_images
from jobs.train_demo import STAGES, main
from jobs.training.trainer import Stage, Trainer


def first_right(rows: Sequence[DemoRow], point: Point, count: int) -> tuple[str, ...]:
    """Answers of the rows that a point measures, the first of them right."""
    answered = [each.row for each in rows_with_images(rows, point.images)]
    return tuple(r.question.answer if i < count else "x" for i, r in enumerate(answered))


@pytest.fixture
def short_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four stages of four steps, saved after each."""
    monkeypatch.setattr("jobs.training.trainer.LOG_STEPS", 1)
    monkeypatch.setattr("jobs.training.trainer.SAVE_STEPS", 1)
    monkeypatch.setattr("jobs.training.trainer.VALIDATION_BATCHES", 1)
    for name, course in STAGES.items():
        asked = 3 if course.stage.questions else 0
        stage = Stage(name, 0, 4, 2, asked, 1e-3)
        monkeypatch.setitem(STAGES, name, replace(course, stage=stage))


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], int], None]:
    """Runs `main` with arguments, and stops it behind its n-th checkpoint."""

    def run(arguments: list[str], saves: int) -> None:
        save, saved = Trainer._save, 0

        def stopping(self: Trainer, *of: object) -> None:
            nonlocal saved
            save(self, *of)  # type: ignore[arg-type]
            saved += 1
            if saved == saves:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_save", stopping)
            with pytest.raises(KeyboardInterrupt):
                main(arguments)

    return run

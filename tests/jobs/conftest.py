"""Stages short enough for tests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.train_demo import STAGES
from jobs.training.trainer import Stage


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

"""Tiny checkpoints in today's files, and in those that the hub had."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def today(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Checkpoints of today by family, and whether their head is tied."""

    from tests.support.old_layouts import build_today

    @cache
    def of(family: str, *, tied: bool) -> Path:
        return build_today(family, tmp_path_factory.mktemp(family), tied=tied)

    return of


@pytest.fixture(scope="session")
def old(
    today: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Checkpoints in old layouts, by name; not to be changed."""

    from tests.support.old_layouts import LAYOUTS, write_old

    @cache
    def of(name: str) -> Path:
        layout = LAYOUTS[name]
        source = today(layout.family, tied=layout.tied)
        return write_old(layout, source, tmp_path_factory.mktemp("old") / "model")

    return of

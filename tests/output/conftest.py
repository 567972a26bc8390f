"""An output that tests damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damage import PLAN
from tests.support.outputs import write_round


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_round(tmp_path / "out", 0, PLAN)
    return tmp_path / "out"

"""A model whose files tests change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A whole one, to be broken."""
    return Path(shutil.copytree(tiny_paths["vicuna"], tmp_path / "model"))

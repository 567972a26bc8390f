"""A model whose files tests change, one that they fetch, and a cache for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.fetching import UNWANTED, WANTED


@pytest.fixture
def model(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    """A whole one, to be broken."""
    return Path(shutil.copytree(tiny_paths["vicuna"], tmp_path / "model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GC2RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory that looks like a model, and has things in it that nobody should fetch."""
    for name in WANTED | UNWANTED:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(3000))
    return tmp_path / "source"

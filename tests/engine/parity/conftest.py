"""Rows that models are checked with, and short answers to them."""

from __future__ import annotations

from pathlib import Path

import pytest

PROMPTS = ("What is in the picture?", "How many\n\n objects  are there?", "Which colour?")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of other shapes and prompts."""
    from tests.support.parity import write_rows

    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", PROMPTS)


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own tests have all 32."""
    monkeypatch.setattr("gc2ray.engine.parity.check.NEW_TOKENS", 10)

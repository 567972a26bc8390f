"""`make demo`, as a new user's first run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]


def demo(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.demo"],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_runs_on_real_photographs_and_can_run_again(tmp_path: Path) -> None:
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "weights are random" in first.stdout
    assert "1 bad_image" in first.stdout
    rows = pq.read_table(tmp_path / "demo-output/run/data").to_pylist()
    photos = {row["photo"] for row in rows if row["status"] == "ok"}
    assert len(photos) >= 12
    grids = {len(row["kept_per_view"][0]) for row in rows if row["status"] == "ok"}
    assert grids == {3, 4, 5}, "one crop row, one crop column and two by two all occur"
    assert [row["photo"] for row in rows if row["status"] != "ok"] == ["broken.jpg"]
    kept = sum(row["visual_tokens_kept"] for row in rows if row["status"] == "ok")
    full = sum(row["visual_tokens_full"] for row in rows if row["status"] == "ok")
    assert 0.2 < kept / full < 0.26
    assert demo(tmp_path).returncode == 0, "a second demo starts afresh"


def test_the_demo_deletes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "precious").touch()
    result = demo(tmp_path)
    assert result.returncode == 1
    assert "is not an earlier demo's; move it away" in result.stderr
    assert (tmp_path / "demo-output" / "precious").exists()

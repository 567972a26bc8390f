"""`make demo`, as a new user's first run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.demo import MARKER, main

ROOT = Path(__file__).parents[2]


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
@pytest.mark.timeout(200)
def test_the_demo_gives_right_answers_where_an_earlier_one_was(tmp_path: Path) -> None:
    left = tmp_path / "demo-output" / "run" / "left"
    left.mkdir(parents=True)
    (tmp_path / "demo-output" / MARKER).touch()
    first = demo(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "1 bad_image" in first.stdout
    assert "Which" in first.stdout
    found = re.search(r"same answer compressed and uncompressed: (0\.\d+)", first.stdout)
    assert found
    assert float(found[1]) > 0.8
    table = {
        name: (float(accuracy), int(tokens))
        for name, accuracy, tokens in re.findall(
            r"│ (compressed|uncompressed) +│ ([01]\.\d+) \[.*?\] +│ (\d+) +│", first.stdout
        )
    }
    assert table["uncompressed"][0] > 0.88
    assert table["compressed"][0] > 0.78
    assert table["compressed"][1] < 0.15 * table["uncompressed"][1]
    rows = pq.read_table(tmp_path / "demo-output/run/data").to_pylist()
    grids = {len(row["kept_per_view"][0]) for row in rows if row["status"] == "ok"}
    assert grids == {3, 4, 5}, "crop grids of two, three and four"
    assert [row["id"] for row in rows if row["status"] != "ok"] == ["broken"]
    assert not left.exists(), "a demo starts afresh"
    assert (tmp_path / "demo-output" / MARKER).exists(), "and a second one would"


def test_the_demo_deletes_nothing_that_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "precious").touch()
    with pytest.raises(SystemExit, match="is not an earlier demo's; move it away"):
        main()
    assert (tmp_path / "demo-output" / "precious").exists()

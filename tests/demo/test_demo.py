"""`gc2ray demo`, as a new user's first run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gc2ray.core.config.job import load_job
from gc2ray.core.errors import ConfigError
from gc2ray.demo import demo as demo_module
from gc2ray.demo.demo import JOB_NAME, MARKER, demo

ROOT = Path(__file__).parents[2]


def gc2ray_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gc2ray", "demo"],
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
    root = tmp_path / "demo-output"
    left = root / "run" / "left"
    left.mkdir(parents=True)
    (root / MARKER).touch()
    first = gc2ray_demo(tmp_path)
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
    rows = pq.read_table(root / "run" / "data").to_pylist()
    grids = {len(row["kept_per_view"][0]) for row in rows if row["status"] == "ok"}
    assert grids == {3, 4, 5}, "crop grids of two, three and four"
    assert [row["id"] for row in rows if row["status"] != "ok"] == ["broken"]
    assert not left.exists(), "a demo starts afresh"
    assert (root / MARKER).exists(), "and a second one would"
    assert load_job(root / JOB_NAME).recipe.compression.retention == 0.1


def test_the_demo_deletes_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ConfigError, match=r"--output: .* is not an earlier demo's; move it away"):
        demo(tmp_path)
    assert (tmp_path / "precious").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"--output: .*file/there cannot be made: Not a directory"
    ):
        demo(tmp_path / "file" / "there")


def test_a_package_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "MODEL", tmp_path / "model")
    with pytest.raises(ConfigError, match="has no demo model"):
        demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_photographs_backgrounds_are_textures(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr(demo_module, "opened_photos", missing)
    backgrounds, line = demo_module._backgrounds()
    assert backgrounds == []
    assert line.endswith("for photographs: pip install 'gc2ray[demo]'")

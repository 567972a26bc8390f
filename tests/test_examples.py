"""The examples run as they stand; tests/compression/test_custom_method.py looks into the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gc2ray.demo.questions import CAPTION
from gc2ray.demo.rows import Split, demo_rows
from gc2ray.demo.spec import MODEL

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *words: object, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_images_are_answered(tmp_path: Path) -> None:
    rows = [row for row in demo_rows(Split.TEST, 21, []) if row.question.text == CAPTION]
    names = [f"{row.id}.jpg" for row in rows]
    for name, row in zip(names, rows, strict=True):
        (tmp_path / name).write_bytes(row.image)
    printed = run_example("answer_images.py", MODEL, CAPTION, *names, folder=tmp_path)
    found = re.findall(r"^(.*): (.*) \((\d+) of (\d+) visual tokens\)$", printed, re.MULTILINE)
    assert [name for name, *_ in found] == names
    for (_, answer, kept, full), row in zip(found, rows, strict=True):
        assert 0 < int(kept) <= int(full) // 4
        words = {*answer.split()}  # not every word is right at this retention
        right = {*row.question.answer.split()}
        assert len(words & right) > len(right) // 2


def test_there_is_a_test_for_every_example() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {
        "answer_images.py",
        "custom_method.py",
    }

"""`python -m jobs.evaluate`: any run with a reference column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gc2ray.errors import Status
from gc2ray.manifest import SourceFile, cut_shards
from gc2ray.records import Answer, Provenance, Request
from gc2ray.stats import RunStats
from gc2ray.store import PartFooter, Store
from gc2ray.worker import _part_bytes
from jobs.evaluate import main
from tests.rows import make_recipe

CARRIED = pa.schema([("reference", pa.string()), ("topic", pa.string())])
RECIPE = make_recipe("model")
ROWS = [("7", "7"), ("8", "9"), ("Yes.", "yes"), (None, "no")]


def write_run(folder: Path, rows: Sequence[tuple[str | None, Any]], carried: pa.Schema) -> str:
    """A run of two parts; a row without an answer failed."""
    store = Store(str(folder))
    half = len(rows) // 2
    shards = cut_shards([SourceFile("r.parquet", "f", (half, len(rows) - half))], half, RECIPE)
    for shard in shards:
        span = shard.spans[0]
        answers = [
            answered(row, *rows[row], topic="digit" if row < 2 else "yesno")
            for row in range(span.first, span.stop)
        ]
        stats = sum((answer.stats() for answer in answers), RunStats())
        footer = PartFooter(shard.sid, RECIPE.fingerprint(), "t", "w", len(answers), stats)
        store.commit(shard, _part_bytes(answers, carried, Provenance(1, 0, "w"), footer), "t")
    return str(folder)


def answered(row: int, answer: str | None, reference: Any, topic: str) -> Answer:
    carried = {"reference": reference, "topic": topic}
    request = Request(f"r.parquet#{row}", "r.parquet", row, (), (), carried)
    if answer is None:
        return Answer(request, Status.BAD_IMAGE, "none", 1.0, error="broken")
    return Answer(
        request, Status.OK, "none", 1.0, answer=answer, visual_tokens_kept=30, newline_tokens=4
    )


def document(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


def test_scores_of_a_run_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", ROWS, CARRIED)
    assert main([run, "--reference", "reference", "--by", "topic"]) == 0
    out, found = document(capsys)
    assert "4 rows, 1 failed, 34 visual tokens a row" in " ".join(out.split())
    scores = found[run]["scores"]
    assert scores["all"]["exact_match"]["mean"] == 0.5
    assert scores["digit"]["exact_match"]["mean"] == 0.5
    assert scores["all"]["yes_no"] == {"mean": 0.5, "low": 0.0, "high": 1.0, "rows": 2}
    assert set(scores["digit"]) == {"exact_match", "vqa_accuracy", "contains", "anls"}


def test_two_runs_are_compared_row_by_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_run(tmp_path / "a", ROWS, CARRIED)
    other = [("7", "7"), ("9", "9"), ("yes", "yes"), ("no", "no")]
    second = write_run(tmp_path / "b", other, CARRIED)
    assert main([first, second, "--reference", "reference", "--metric", "exact_match"]) == 0
    out, found = document(capsys)
    compared = found[f"{first} - {second}"]
    assert compared["same"]["mean"] == 0.5
    assert compared["differences"]["exact_match"]["mean"] == -0.5
    assert "same answer on 0.500" in out


def test_a_reference_may_be_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carried = pa.schema([("reference", pa.list_(pa.string())), ("topic", pa.string())])
    rows = [("7", ["seven", "7"]), ("8", ["9"]), ("x", ["x", None]), ("y", ["z"])]
    run = write_run(tmp_path / "a", rows, carried)
    assert main([run, "--reference", "reference", "--metric", "exact_match"]) == 0
    assert document(capsys)[1][run]["scores"]["all"]["exact_match"]["mean"] == 0.5


def test_what_is_missing_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", ROWS, CARRIED)
    empty = write_run(tmp_path / "b", [("7", "7"), ("8", None)], CARRIED)
    for arguments, problem in (
        ([run, "--reference", "label"], "no column 'label'; input columns are written back"),
        ([str(tmp_path / "none"), "--reference", "reference"], "holds no answers"),
        ([empty, "--reference", "reference"], "row r.parquet#1 has no reference"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert problem in captured.err
        assert len(captured.err.strip().splitlines()) == 1
        assert captured.out == ""


def test_an_answer_column_is_no_reference_by_accident(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])

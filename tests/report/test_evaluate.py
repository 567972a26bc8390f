"""`python -m jobs.evaluate`: any run with a reference column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import SourceFile, cut_shards
from gc2ray.data.store import Store
from gc2ray.output.parts import PartFooter, commit_part, part_bytes
from jobs.evaluate import main
from tests.support.rows import make_recipe

CARRIED = pa.schema([("reference", pa.string()), ("topic", pa.string())])
RECIPE = make_recipe("model")
ROWS = [("7", "7"), ("8", "9"), ("Yes.", "yes"), (None, "no")]


def write_run(folder: Path, rows: Sequence[tuple[str | None, Any]], carried: pa.Schema) -> str:
    """A run of two parts; a row without an answer failed."""
    store = Store(str(folder))
    half = len(rows) // 2
    file = SourceFile("r.parquet", "f", (half, len(rows) - half))
    shards = cut_shards([file], half, RECIPE.fingerprint())
    for shard in shards:
        span = shard.spans[0]
        answers = [
            answered(row, *rows[row], topic="digit" if row < 2 else "yesno")
            for row in range(span.first, span.stop)
        ]
        stats = stats_of(answers)
        footer = PartFooter(shard.sid, RECIPE.fingerprint(), "t", "w", len(answers), stats)
        commit_part(store, shard, part_bytes(answers, carried, Provenance(1, 0, "w"), footer), "t")
    return str(folder)


def answered(row: int, answer: str | None, reference: Any, topic: str) -> Answer:
    carried = {"reference": reference, "topic": topic}
    request = Request(f"r.parquet#{row}", "r.parquet", row, (), (), carried)
    if answer is None:
        return Answer(request, Status.BAD_IMAGE, "none", 1.0, error="broken")
    return Answer(
        request, Status.OK, "none", 1.0, answer=answer, visual_tokens_kept=30, newline_tokens=4
    )


def write_listed_run(folder: Path, answers: Sequence[Sequence[str | None]]) -> str:
    """Rows with several prompts, and a list of references each."""
    references = [["7", "red"], ["8", "blue", "left"], ["yes"]]
    carried = pa.schema([("reference", pa.list_(pa.string())), ("topic", pa.string())])
    store = Store(str(folder))
    (shard,) = cut_shards([SourceFile("r.parquet", "f", (3,))], 3, RECIPE.fingerprint())
    written = [
        replace(
            found,
            request=replace(found.request, row_key=f"r.parquet#{row}#{index}", prompt_index=index),
        )
        for row, texts in enumerate(answers)
        for index, text in enumerate(texts)
        for found in [answered(row, text, references[row], f"topic{row}")]
    ]
    stats = stats_of(written)
    footer = PartFooter(shard.sid, RECIPE.fingerprint(), "t", "w", 3, stats)
    commit_part(store, shard, part_bytes(written, carried, Provenance(1, 0, "w"), footer), "t")
    return str(folder)


LISTED = [["7", "red"], ["8", "green", None], ["yes"]]


def test_each_prompt_has_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_listed_run(tmp_path / "a", LISTED)
    arguments = [run, "--reference", "reference", "--metric", "exact_match", "--by", "topic"]
    assert main([*arguments, "--lists", "each"]) == 0
    out, found = document(capsys)
    assert "6 answers, 1 failed" in " ".join(out.split())
    assert found[run]["answers"] == 6
    scores = {name: each["exact_match"]["mid"] for name, each in found[run]["scores"].items()}
    assert scores == pytest.approx({"all": 4 / 6, "topic0": 1.0, "topic1": 1 / 3, "topic2": 1.0})


def test_a_list_may_be_right_for_every_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = write_listed_run(tmp_path / "a", [["red", "7"], ["left", "8", "8"], ["yes"]])
    arguments = [swapped, "--reference", "reference", "--metric", "exact_match", "--lists"]
    for lists, mean in (("any", 1.0), ("each", 1 / 6)):
        assert main([*arguments, lists]) == 0
        scores = document(capsys)[1][swapped]["scores"]
        assert scores["all"]["exact_match"]["mid"] == pytest.approx(mean)


def test_what_a_list_is_must_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_listed_run(tmp_path / "a", LISTED)
    assert main([run, "--reference", "reference"]) == 2
    assert "say --lists any" in capsys.readouterr().err
    more = write_listed_run(tmp_path / "b", [["7", "red"], ["8", "blue", "left"], ["yes", "no"]])
    assert main([more, "--reference", "reference", "--lists", "each"]) == 2
    assert "row r.parquet#2#1 has no reference" in capsys.readouterr().err


def test_runs_with_lists_are_paired_by_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_listed_run(tmp_path / "a", LISTED)
    second = write_listed_run(tmp_path / "b", [["7", "blue"], ["8", "blue", "left"], ["yes"]])
    arguments = ["--reference", "reference", "--metric", "exact_match", "--lists", "each"]
    assert main([first, second, *arguments]) == 0
    compared = document(capsys)[1][f"{first} - {second}"]
    assert compared["same"]["mid"] == pytest.approx(3 / 6)
    assert compared["differences"]["exact_match"]["mid"] == pytest.approx(-1 / 6)
    assert (compared["only_first"], compared["only_second"]) == (0, 0)


def document(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


def test_scores_of_a_run_by_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", ROWS, CARRIED)
    assert main([run, "--reference", "reference", "--by", "topic"]) == 0
    out, found = document(capsys)
    assert "4 answers, 1 failed, 34 visual tokens each" in " ".join(out.split())
    scores = found[run]["scores"]
    assert scores["all"]["exact_match"]["mid"] == 0.5
    assert scores["digit"]["exact_match"]["mid"] == 0.5
    assert scores["all"]["yes_no"] == {"low": 0.0, "mid": 0.5, "high": 1.0, "rows": 2}
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
    assert compared["same"]["mid"] == 0.5
    assert compared["differences"]["exact_match"]["mid"] == -0.5
    assert "same answer on 0.500" in out


def test_a_reference_may_be_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carried = pa.schema([("reference", pa.list_(pa.string())), ("topic", pa.string())])
    rows = [("7", ["seven", "7"]), ("8", ["9"]), ("x", ["x", None]), ("y", ["z"])]
    run = write_run(tmp_path / "a", rows, carried)
    assert main([run, "--reference", "reference", "--metric", "exact_match"]) == 0
    assert document(capsys)[1][run]["scores"]["all"]["exact_match"]["mid"] == 0.5


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

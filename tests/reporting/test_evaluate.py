"""`gc2ray evaluate`: any run with a reference column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gc2ray.core.config.job import Job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import Shard, Shards, SourceFile, Span, cut_shards
from gc2ray.data.store import Store
from gc2ray.output.parts import PartFooter, commit_part, part_bytes
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from tests.support.commands import run_command
from tests.support.outputs import first_plan, parts, retry_of, write_round
from tests.support.rows import make_recipe

KEPT_COLUMNS = pa.schema([("reference", pa.string()), ("topic", pa.string())])
RECIPE = make_recipe("model")
SCORED = ("--reference", "reference")
ROWS = [("7", "7"), ("8", "9"), ("Yes.", "yes"), (None, "no")]


def write_run(folder: Path, rows: Sequence[tuple[str | None, Any]], kept_columns: pa.Schema) -> str:
    """A run of two parts; a row without an answer failed."""
    half = len(rows) // 2
    file = SourceFile("r.parquet", "f", (half, len(rows) - half))
    shards = list(cut_shards([file], half, RECIPE.fingerprint()))
    store = planned(folder, shards, kept_columns)
    for shard in shards:
        span = shard.spans[0]
        answers = [
            answered(row, *rows[row], topic="digit" if row < 2 else "yesno")
            for row in range(span.first, span.stop)
        ]
        stats = stats_of(answers)
        footer = PartFooter(shard.sid, RECIPE.fingerprint(), "t", "w", len(answers), stats)
        commit_part(
            store, shard, part_bytes(answers, kept_columns, Provenance(1, 0, "w"), footer), "t"
        )
    return str(folder)


def planned(folder: Path, shards: Sequence[Shard], kept_columns: pa.Schema) -> Store:
    store = Store(str(folder))
    plan = Plan(RECIPE.fingerprint(), Shards.from_shards(shards), kept_columns)
    store_plan(store, Job(output=store.uri, recipe=RECIPE), plan)
    return store


def answered(row: int, answer: str | None, reference: Any, topic: str) -> Answer:
    kept_columns = {"reference": reference, "topic": topic}
    request = Request(f"r.parquet#{row}", "r.parquet", row, (), (), kept_columns)
    if answer is None:
        return Answer(request, Status.BAD_IMAGE, "none", 1.0, error="broken")
    return Answer(
        request, Status.OK, "none", 1.0, answer=answer, visual_tokens_kept=30, newline_tokens=4
    )


def write_listed_run(folder: Path, answers: Sequence[Sequence[str | None]]) -> str:
    """Rows with several prompts, and a list of references each."""
    references = [["7", "red"], ["8", "blue", "left"], ["yes"]]
    kept_columns = pa.schema([("reference", pa.list_(pa.string())), ("topic", pa.string())])
    (shard,) = cut_shards([SourceFile("r.parquet", "f", (3,))], 3, RECIPE.fingerprint())
    store = planned(folder, [shard], kept_columns)
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
    commit_part(store, shard, part_bytes(written, kept_columns, Provenance(1, 0, "w"), footer), "t")
    return str(folder)


BROKEN = Status.BAD_IMAGE
LISTED = [["7", "red"], ["8", "green", None], ["yes"]]


def test_each_prompt_has_its_reference(tmp_path: Path) -> None:
    run = write_listed_run(tmp_path / "a", LISTED)
    arguments = [run, "--reference", "reference", "--metric", "exact_match", "--by", "topic"]
    assert "6 answers, 1 failed" in tables(*arguments, "--lists", "each")
    found = document(*arguments, "--lists", "each")
    assert found[run]["answers"] == 6
    scores = {name: each["exact_match"]["mid"] for name, each in found[run]["scores"].items()}
    assert scores == pytest.approx({"all": 4 / 6, "topic0": 1.0, "topic1": 1 / 3, "topic2": 1.0})


def test_a_list_may_be_right_for_every_prompt(tmp_path: Path) -> None:
    swapped = write_listed_run(tmp_path / "a", [["red", "7"], ["left", "8", "8"], ["yes"]])
    arguments = [swapped, "--reference", "reference", "--metric", "exact_match", "--lists"]
    for lists, mean in (("any", 1.0), ("each", 1 / 6)):
        scores = document(*arguments, lists)[swapped]["scores"]
        assert scores["all"]["exact_match"]["mid"] == pytest.approx(mean)


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, KEPT_COLUMNS)
    assert document(run, "--reference", "reference")[run]["unanswered_rows"] == 0
    assert "not scored" not in tables(run, "--reference", "reference")
    parts(tmp_path / "a")[1].unlink()
    assert document(run, "--reference", "reference")[run]["unanswered_rows"] == 2
    assert f"{run}: 2 more rows have no answer and are not" in tables(
        run, "--reference", "reference"
    )


def test_an_output_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, ROWS, KEPT_COLUMNS) for name in ("a", "b")]
    path = tmp_path / "b" / "run.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    assert f"{runs[1]}: run.json: begun by an older gc2ray" in problem(*runs, *SCORED)


def test_the_meaning_of_lists_must_be_given(tmp_path: Path) -> None:
    run = write_listed_run(tmp_path / "a", LISTED)
    assert "say --lists any" in problem(run, "--reference", "reference")
    more = write_listed_run(tmp_path / "b", [["7", "red"], ["8", "blue", "left"], ["yes", "no"]])
    message = problem(more, "--reference", "reference", "--lists", "each")
    assert "row r.parquet#2#1 has no reference" in message
    assert message.strip().endswith("; --lists each takes from a list the entry of each prompt")


def test_runs_with_lists_are_paired_by_prompt(tmp_path: Path) -> None:
    first = write_listed_run(tmp_path / "a", LISTED)
    second = write_listed_run(tmp_path / "b", [["7", "blue"], ["8", "blue", "left"], ["yes"]])
    arguments = ["--reference", "reference", "--metric", "exact_match", "--lists", "each"]
    compared = document(first, second, *arguments)[f"{first} - {second}"]
    assert compared["same"]["mid"] == pytest.approx(3 / 6)
    assert compared["differences"]["exact_match"]["mid"] == pytest.approx(-1 / 6)
    assert (compared["only_first"], compared["only_second"]) == (0, 0)


def tables(*arguments: str) -> str:
    """What the command prints, without its line breaks."""
    result = run_command("evaluate", *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return " ".join(result.stdout.split())


def document(*arguments: str) -> dict[str, Any]:
    """Its JSON, which is all that it prints then."""
    result = run_command("evaluate", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def problem(*arguments: str) -> str:
    """The one line that says why runs cannot be evaluated."""
    result = run_command("evaluate", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_scores_of_a_run_by_group(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, KEPT_COLUMNS)
    arguments = [run, "--reference", "reference", "--by", "topic"]
    assert "4 answers, 1 failed, 34 visual tokens each" in tables(*arguments)
    scores = document(*arguments)[run]["scores"]
    assert scores["all"]["exact_match"]["mid"] == 0.5
    assert scores["digit"]["exact_match"]["mid"] == 0.5
    assert scores["all"]["yes_no"] == {"low": 0.0, "mid": 0.5, "high": 1.0, "rows": 2}
    assert set(scores["digit"]) == {"exact_match", "vqa_accuracy", "contains", "anls"}


def test_two_runs_are_compared_row_by_row(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", ROWS, KEPT_COLUMNS)
    other = [("7", "7"), ("9", "9"), ("yes", "yes"), ("no", "no")]
    second = write_run(tmp_path / "b", other, KEPT_COLUMNS)
    arguments = [first, second, "--reference", "reference", "--metric", "exact_match"]
    compared = document(*arguments)[f"{first} - {second}"]
    assert compared["same"]["mid"] == 0.5
    assert compared["differences"]["exact_match"]["mid"] == -0.5
    assert "same answer on 0.500" in tables(*arguments)


def test_a_reference_may_be_a_list(tmp_path: Path) -> None:
    kept_columns = pa.schema([("reference", pa.list_(pa.string())), ("topic", pa.string())])
    rows = [("7", ["seven", "7"]), ("8", ["9"]), ("x", ["x", None]), ("y", ["z"])]
    run = write_run(tmp_path / "a", rows, kept_columns)
    scores = document(run, "--reference", "reference", "--metric", "exact_match")[run]["scores"]
    assert scores["all"]["exact_match"]["mid"] == 0.5


def test_answers_of_a_retry_count(tmp_path: Path) -> None:
    """A row that failed first and was answered in a retry is scored by that answer."""
    write_round(tmp_path, 0, first_plan(), lambda _, row: [BROKEN if row == 3 else Status.OK])
    arguments = [str(tmp_path), "--reference", "id", "--metric", "contains"]
    before = document(*arguments)[str(tmp_path)]
    spans = [Span("a.parquet", "fa", 3, 4), Span("d/b.parquet", "fb", 3, 4)]
    write_round(tmp_path, 1, retry_of(spans))
    after = document(*arguments)[str(tmp_path)]
    assert (before["answers"], before["failed"]) == (17, 2)
    assert (after["answers"], after["failed"]) == (17, 0)
    assert after["scores"]["all"]["contains"]["mid"] == 1.0


def test_missing_columns_and_runs_are_reported_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, KEPT_COLUMNS)
    empty = write_run(tmp_path / "b", [("7", "7"), ("8", None)], KEPT_COLUMNS)
    for arguments, message in (
        ([run, "--reference", "label"], "no column 'label'; input columns are written back"),
        ([str(tmp_path / "none"), "--reference", "reference"], "there is no run here"),
        ([empty, "--reference", "reference"], "row r.parquet#1 has no reference"),
        ([run, "--reference", "reference", "--metric", "exact"], "did you mean 'exact_match'?"),
    ):
        assert message in problem(*arguments)


def test_nothing_is_answered_yet(tmp_path: Path) -> None:
    store_plan(Store(str(tmp_path)), Job(output=str(tmp_path), recipe=RECIPE), first_plan())
    assert "holds no answers yet" in problem(str(tmp_path), "--reference", "id")


def test_a_reference_must_be_named(tmp_path: Path) -> None:
    result = run_command("evaluate", tmp_path)
    assert result.exit_code == 2
    assert "--reference" in result.stderr

"""How a run ends: what is said of it, and its exit code, which is a function of the output."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from rich.console import Console

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer
from gc2ray.core.schema import stats_of, table_stats
from gc2ray.output.planner import read_status
from gc2ray.output.retry import next_retry
from gc2ray.reporting.terminal import print_outcome
from gc2ray.runner.run import run_retry
from tests.support.commands import run_command
from tests.support.outputs import (
    FILES,
    RECIPE,
    Outcome,
    all_ok,
    an_answer,
    first_plan,
    parts,
    write_round,
)

ROWS = sum(file.rows for file in FILES)
ALLOWS = "cluster.max_bad_rows = 0.05 allows"


def bad(rows: Collection[int], source: str = "a.parquet") -> Outcome:
    """These rows of a file fail."""
    return lambda s, row: [Status.BAD_IMAGE if s == source and row in rows else Status.OK]


@pytest.fixture(autouse=True)
def _as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are made by hand have a recipe with relative paths."""
    monkeypatch.setattr(Job, "located", lambda self: self)


def run(tmp_path: Path, *overrides: str) -> Result:
    job = {"output": str(tmp_path / "out"), "recipe": RECIPE.model_dump(mode="json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return run_command("run", tmp_path / "job.json", *overrides)


@pytest.mark.parametrize("failed", [0, 1, 10])
def test_too_many_failures_are_no_success_however_few_rows_there_are(
    tmp_path: Path, failed: int
) -> None:
    """One of 17 is more than 5 %. A rerun says the same, and `status` tells completeness alone."""
    write_round(tmp_path / "out", 0, first_plan(), bad(range(failed)))
    first, again = run(tmp_path), run(tmp_path)
    assert (first.exit_code, first.stdout) == (again.exit_code, again.stdout)
    assert first.exit_code == (1 if failed else 0)
    assert (f"{failed} of 17 answers failed, more than {ALLOWS}" in first.stdout) == (failed > 0)
    status = run_command("status", tmp_path / "out")
    assert (status.exit_code, ALLOWS in status.stdout) == (0, False)
    accepted = run(tmp_path, "cluster.max_bad_rows=1")
    assert (accepted.exit_code, ALLOWS in accepted.stdout) == (0, False)


def test_the_first_failures_and_the_next_command_are_printed(tmp_path: Path) -> None:
    """By `status`, too; and a terminal follows no codes of an input's."""

    def shown(answer: Answer) -> Answer:
        return replace(answer, error=answer.error and f"\x1b[31m[red]{answer.error}\n" + "x" * 500)

    write_round(tmp_path / "out", 0, first_plan(), bad((1, 4, 5, 8)), changed=shown)
    for result in (run(tmp_path), run_command("status", tmp_path / "out")):
        lines = result.stdout.splitlines()
        at = lines.index("first failed answers:")
        keys = [f"  a.parquet#{row}: bad_image:  [31m[red]bad in 0 xxx" for row in (1, 4, 5)]
        assert [line[: len(key)] for line, key in zip(lines[at + 1 :], keys, strict=False)] == keys
        assert all(len(line) < 450 for line in lines)
        assert not lines[at + 4].startswith("  a.parquet")
        assert f"to answer them again: gc2ray retry {tmp_path / 'out'}" in lines


def test_rows_that_fail_again_are_no_reason_to_retry_again(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan(), bad((1, 4)))
    retry = next_retry(str(tmp_path / "out"))
    assert retry is not None
    write_round(tmp_path / "out", 1, retry.plan, bad((1, 4)))
    outcome = read_status(str(tmp_path / "out/retry_rounds/1")).outcome
    console = Console(record=True, file=io.StringIO())
    print_outcome(console, outcome, str(tmp_path / "out"), retry_round=1)
    text = console.export_text()
    assert "answers that failed again: 2" in text
    assert "gc2ray retry" not in text


def test_rows_that_a_retry_answered_are_not_missing(tmp_path: Path) -> None:
    """The shard that was given up keeps its dead letter, and has no part in the run itself."""

    def outcome(source: str, row: int) -> list[Status] | None:
        return None if (source, row) == ("a.parquet", 4) else [Status.OK]

    write_round(tmp_path, 0, first_plan(), outcome)
    status = run_command("status", tmp_path)
    assert (status.exit_code, "it died" in status.stdout) == (1, True)
    retry = next_retry(str(tmp_path))
    assert retry is not None
    write_round(tmp_path, 1, retry.plan, outcome)
    assert run_command("status", tmp_path).exit_code == 1
    write_round(tmp_path, 2, retry.plan)
    status = run_command("status", tmp_path)
    assert (status.exit_code, "it died" in status.stdout) == (0, False)
    assert "17 of 17" in status.stdout
    assert "not committed" not in status.stdout
    assert run_command("verify", tmp_path).exit_code == 0


def test_verify_names_a_retry_round_that_is_not_finished(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan(), bad((1, 4)))
    retry = next_retry(str(tmp_path / "out"))
    assert retry is not None
    write_round(tmp_path / "out", 1, retry.plan)
    parts(tmp_path / "out/retry_rounds/1")[0].unlink()
    result = run_command("verify", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == [
        "incomplete: 17 of 17 planned rows are answered",
        f"retry round 1 is not finished; to resume it: gc2ray retry {tmp_path / 'out'}",
    ]


def test_an_incomplete_run_is_resumed_first(tmp_path: Path) -> None:
    write_round(tmp_path / "out", 0, first_plan(), bad((1,)))
    parts(tmp_path / "out")[2].unlink()
    status = run_command("status", tmp_path / "out")
    assert status.exit_code == 1
    assert "rows are not committed; run the job again to resume" in status.stdout
    assert "a.parquet#1: bad_image: bad in 0" in status.stdout
    assert "gc2ray retry" not in status.stdout


def test_a_run_is_summarised_despite_an_unreadable_part(tmp_path: Path) -> None:
    """Its footer is whole; what it says of errors is what is missing."""
    write_round(tmp_path / "out", 0, first_plan(), bad((1,)))
    part = parts(tmp_path / "out")[0]
    data = part.read_bytes()
    column = pq.read_metadata(part).row_group(0).column(7)
    place = column.data_page_offset or 0
    part.write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "1 of 17 answers failed" in result.stdout
    assert "cannot be read: " in result.stdout


@pytest.mark.parametrize("mended", [0, 1, 9, 10])
def test_a_retry_is_judged_by_the_latest_answers_of_the_whole_output(
    tmp_path: Path, mended: int
) -> None:
    """Ten of 17 had failed; and so is a rerun of the run, and a retry with nothing to do."""
    output = str(tmp_path / "out")
    write_round(output, 0, first_plan(), bad(range(10)))
    retry = next_retry(output)
    assert retry is not None
    write_round(output, 1, retry.freeze(), bad(range(mended, 10)))
    found = run_retry(retry, Cluster(max_bad_rows=0.1)).outcome
    assert found.judged is not None
    assert (found.judged.answers, found.judged.failed) == (ROWS, 10 - mended)
    assert found.exit_code == (0 if mended >= 9 else 1)
    again = run(tmp_path, "cluster.max_bad_rows=0.1")
    assert again.exit_code == found.exit_code
    assert ("first failed answers" in again.stdout) == (mended < 10)
    nothing = run_command("retry", output, "cluster.max_bad_rows=0.1", "--status", "timeout")
    assert "no row has to be answered again" in nothing.stdout
    assert nothing.exit_code == found.exit_code


def test_a_run_is_summarised_despite_a_damaged_output(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    write_round(output, 0, first_plan(), bad(range(10)))
    retry = next_retry(output)
    assert retry is not None
    write_round(output, 1, retry.freeze())
    (tmp_path / "out/data/notes.txt").touch()
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "10 of 17 answers failed" in result.stdout


# --- answers that say nothing ------------------------------------------------------------------


def test_blank_answers_are_counted_and_reported(tmp_path: Path) -> None:
    texts = iter(["", " \n\u2003", "\x1c", *["words"] * 20])

    def blank(answer: Answer) -> Answer:
        return replace(answer, answer=next(texts)) if answer.answer is not None else answer

    write_round(tmp_path / "out", 0, first_plan(), bad((5,)), changed=blank)
    result = run(tmp_path, "cluster.max_bad_rows=1")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["│", "blank", "answers", "│", "3", "│"] in lines
    assert run_command("verify", tmp_path / "out", "--deep").exit_code == 0
    report = run_command("report", tmp_path / "out")
    assert report.exit_code == 0, report.stderr
    assert json.loads((tmp_path / "out/report/report.json").read_text())
    assert "ok, but blank" in (tmp_path / "out/report/report.md").read_text()


def test_rows_and_footers_agree_on_blank_answers(tmp_path: Path) -> None:
    write_round(
        tmp_path,
        0,
        first_plan(),
        all_ok,
        changed=lambda a: replace(a, answer=" " * (a.request.row % 2)),
    )
    found = [table_stats(pq.read_table(part)).empty_answers for part in parts(tmp_path)]
    assert sum(found) == ROWS
    failed = an_answer("a.parquet", 1, None, Status.FAILED)
    assert stats_of([failed]).empty_answers == 0

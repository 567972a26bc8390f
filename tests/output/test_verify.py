"""What `verify` must see of a whole output: every damage, made one at a time on a good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import Span
from gc2ray.output.plan import PLAN_NAME
from gc2ray.output.run_directory import RUN_NAME
from gc2ray.output.verify import verify
from tests.support.damage import PLAN, SECOND, found, second
from tests.support.outputs import (
    FILES,
    all_ok,
    answers_of,
    first_plan,
    part_of,
    parts,
    retry_of,
    rewrite,
    with_column,
    write_round,
)


def mixed(source: str, row: int) -> list[Status]:
    """One to three prompts a row, some of them bad, and rows that are bad as a whole."""
    if row % 5 == 3:
        return [Status.BAD_IMAGE]
    return [Status.OK, Status.TOO_LONG, Status.OK][: 1 + row % 3]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_a_good_output_is_found_good(tmp_path: Path, *, deep: bool, listed: bool) -> None:
    outcome = mixed if listed else (lambda source, row: mixed(source, row)[:1])
    write_round(tmp_path, 0, PLAN, outcome, listed=listed)
    verdict = verify(str(tmp_path), deep=deep)
    assert (verdict.problems, verdict.notes, verdict.exit_code) == ((), (), 0)
    assert (verdict.rows, verdict.planned_rows) == (17, 17)
    (checked,) = verdict.rounds
    answers = [mixed(file.source, row) for file in FILES for row in range(file.rows)]
    statuses = [status for row in answers for status in (row if listed else row[:1])]
    assert checked.stats.rows == len(statuses)
    assert checked.failed.sum() == sum(status != Status.OK for status in statuses)
    assert checked.committed.all()
    assert checked.rows == 17


def a_missing_part(output: Path) -> str:
    second(output).unlink()
    return "shard 1 (3 rows): not answered yet; run again"


def test_a_missing_part_is_not_damage(output: Path) -> None:
    line = a_missing_part(output)
    verdict = verify(str(output))
    assert (verdict.damage, verdict.missing) == ((), (line,))
    assert (verdict.rows, verdict.planned_rows, verdict.exit_code) == (14, 17, 1)


def test_missing_parts_in_a_row_are_one_line(output: Path) -> None:
    for index in (1, 2, 3, 5):
        (output / PLAN.shards[index].part_name).unlink()
    (output / "dead").mkdir()
    (output / f"dead/{PLAN.shards[2].sid}.3.json").write_text("{}")
    assert found(output, deep=False) == (
        "shard 1 (3 rows): not answered yet; run again",
        "shard 3 (3 rows): not answered yet; run again",
        "shard 5 (2 rows): not answered yet; run again",
        "shard 2 (2 rows without an answer): given up, dead/ says why; run again, or "
        "`gc2ray retry`",
    )
    (output / f"dead/{PLAN.shards[2].sid}.3.json").unlink()
    assert found(output, deep=False)[0] == ("shards 1 to 3 (8 rows): not answered yet; run again")


def a_second_part(output: Path) -> str:
    name = SECOND.part_name.replace(SECOND.sid, "0123456789abcdef")
    (output / name).write_bytes(second(output).read_bytes())
    return name


def a_part_of_no_shard(output: Path) -> str:
    name = SECOND.part_name.replace("0000001", "0000099")
    (output / name).write_bytes(second(output).read_bytes())
    return name


def a_copy_under_another_name(output: Path) -> str:
    name = SECOND.part_name.replace("part", "old-part")
    (output / name).write_bytes(second(output).read_bytes())
    return name


def a_foreign_file(output: Path) -> str:
    (output / "data/notes.txt").write_text("mine")
    return "data/notes.txt"


ORPHANS = [a_second_part, a_part_of_no_shard, a_copy_under_another_name, a_foreign_file]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orphan", ORPHANS)
def test_an_unplanned_part_is_found(
    output: Path, orphan: Callable[[Path], str], *, deep: bool
) -> None:
    name = orphan(output)
    assert found(output, deep=deep) == (f"{name}: is no planned shard's part; move it away",)


def test_a_missing_plan(output: Path) -> None:
    (output / PLAN_NAME).unlink()
    assert found(output, deep=False) == ("plan/0000.parquet: missing, and run.json names it",)


def test_an_edited_plan(output: Path) -> None:
    (output / PLAN_NAME).write_bytes(first_plan(shard_rows=4).to_bytes())
    assert found(output, deep=False) == ("plan/0000.parquet: not the one that run.json names",)


def edited_run(output: Path, **changes: object) -> None:
    path = output / RUN_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_edited_count_of_the_run(output: Path) -> None:
    edited_run(output, rows=18)
    assert found(output, deep=False) == (
        "run.json: names 7 shards with 18 rows, but the plan has 7 with 17",
    )


def test_an_edited_recipe_of_the_run(output: Path) -> None:
    recipe = json.loads((output / RUN_NAME).read_text())["recipe"]
    recipe["generation"]["max_new_tokens"] = 9
    edited_run(output, recipe=recipe)
    assert found(output, deep=False) == (
        "plan/0000.parquet: belongs to another recipe than run.json",
    )


def test_a_retry_with_another_model(output: Path) -> None:
    write_round(output, 1, retry_of([Span("a.parquet", "fa", 0, 2)]))
    assert found(output, deep=False) == ()
    (output / "model.json").write_text('{"digest": "a"}')
    assert found(output, deep=False) == ()
    (output / "retry_rounds/1/model.json").write_text('{"digest": "b"}')
    (problem,) = found(output, deep=False)
    assert problem == (
        "retry_rounds/1/model.json: its model is not the output's; move retry_rounds/1 away"
    )
    (output / "retry_rounds/1/model.json").write_text("b")
    (problem,) = found(output, deep=False)
    assert problem == "retry_rounds/1/model.json: not written by gc2ray, or damaged"


def test_a_plan_that_has_a_row_twice(tmp_path: Path) -> None:
    spans = [Span("a", "f", 0, 4), Span("b", "f", 0, 4), Span("a", "f", 3, 5)]
    write_round(tmp_path, 0, retry_of(spans))
    assert found(tmp_path, deep=False) == ("plan/0000.parquet: a#3 is planned twice",)


@pytest.mark.parametrize("content", [None, b"no json", b'{"format": 99}'])
def test_a_folder_without_a_valid_run_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / RUN_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.json"):
        verify(str(tmp_path))


def test_leftovers_and_dead_letters_of_committed_shards_are_no_problem(output: Path) -> None:
    (output / "dead").mkdir()
    (output / f"dead/{SECOND.sid}.3.json").write_text("{}")
    (output / "_tmp/x").write_text("half a part")
    verdict = verify(str(output), deep=True)
    assert (verdict.problems, verdict.exit_code) == ((), 0)
    assert verdict.notes == (
        "dead: 1 shards were given up and committed later",
        "_tmp: 1 temporary files of killed processes; a later run removes them",
    )


def test_a_part_that_another_driver_wrote_is_valid(output: Path) -> None:
    """On stores that ignore the condition of a put the last writer wins, whole."""
    answers = [replace(a, device="another") for a in answers_of(SECOND, all_ok, 0) or []]
    second(output).write_bytes(part_of(SECOND, answers))
    assert found(output, deep=True) == ()


def test_an_empty_plan_is_complete(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan(files=[]))
    assert found(tmp_path, deep=True) == ()


# retries


def row_three_fails(source: str, row: int) -> list[Status]:
    return [Status.FAILED if row == 3 else Status.OK]


@pytest.fixture
def retried(tmp_path: Path) -> Path:
    """Row 3 of both files failed, and was answered in retry 1."""
    write_round(tmp_path, 0, PLAN, row_three_fails)
    plan = retry_of([Span("a.parquet", "fa", 3, 4), Span("d/b.parquet", "fb", 3, 4)], 1)
    write_round(tmp_path, 1, plan)
    return tmp_path


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_retry_is_found_good(retried: Path, *, deep: bool) -> None:
    verdict = verify(str(retried), deep=deep)
    assert (verdict.problems, verdict.notes) == ((), ())
    assert [checked.rows for checked in verdict.rounds] == [17, 2]
    assert (verdict.rows, verdict.planned_rows) == (17, 17)


@pytest.mark.parametrize("deep", [False, True])
def test_a_damaged_part_of_a_retry(retried: Path, *, deep: bool) -> None:
    part = parts(retried / "retry_rounds/1")[0]
    part.write_bytes(b"garbage")
    name = part.relative_to(retried)
    assert found(retried, deep=deep) == (
        f"{name}: not a part that gc2ray wrote, or incomplete; move it away, and retry again",
    )
    part.unlink()
    assert found(retried, deep=deep) == (
        "retry_rounds/1/shard 0 (1 rows): not answered yet; retry again",
    )


def test_answers_of_another_round_in_a_retry(retried: Path) -> None:
    part = parts(retried / "retry_rounds/1")[0]
    rewrite(part, lambda table: with_column(table, "retry_round", [0]))
    assert found(retried, deep=True) == (
        f"{part.relative_to(retried)}: has answers of retry_round 0; move it away, and retry again",
    )


def test_a_retry_of_rows_that_were_never_planned(retried: Path) -> None:
    for number, span in enumerate(
        [Span("a.parquet", "fa", 1, 3), Span("a.parquet", "changed", 0, 1)]
    ):
        write_round(retried, 2 + number, retry_of([span]))
        line = (
            f"retry_rounds/{2 + number}/plan/0000.parquet: plans rows that plan/0000.parquet does "
            "not; move it away"
        )
        assert line in found(retried, deep=False)


def test_a_damaged_plan_of_a_retry(retried: Path) -> None:
    (retried / "retry_rounds/1" / PLAN_NAME).unlink()
    assert found(retried, deep=False) == (
        "retry_rounds/1/plan/0000.parquet: missing, and run.json names it",
    )
    (retried / "retry_rounds/1" / RUN_NAME).write_text("no json")
    assert found(retried, deep=False) == (
        "retry_rounds/1/run.json: not written by gc2ray, or damaged",
    )


def test_a_folder_that_is_not_a_retry_is_reported(retried: Path) -> None:
    (retried / "retry_rounds/old").mkdir()
    (retried / "retry_rounds/2").mkdir()
    verdict = verify(str(retried))
    assert verdict.problems == ("retry_rounds/old: is not a retry round; move it away",)
    assert verdict.notes == (
        "retry_rounds/2/run.json: missing; run `gc2ray retry` to begin this round",
    )


def test_rows_of_a_dead_shard_that_a_retry_answered_are_not_missing(tmp_path: Path) -> None:
    def dies(source: str, row: int) -> list[Status] | None:
        return None if (source, row) == ("a.parquet", 3) else [Status.OK]

    write_round(tmp_path, 0, PLAN, dies)
    lost = SECOND.spans[0]
    verdict = verify(str(tmp_path))
    assert (verdict.rows, verdict.planned_rows) == (14, 17)
    assert np.flatnonzero(verdict.rounds[0].given_up).tolist() == [1]
    write_round(tmp_path, 1, retry_of([lost], 1), dies)
    verdict = verify(str(tmp_path), deep=True)
    assert verdict.problems == (
        "shard 1 (1 rows without an answer): given up, dead/ says why; run again, or "
        "`gc2ray retry`",
    )
    assert (verdict.rows, verdict.planned_rows) == (16, 17)
    write_round(tmp_path, 2, retry_of([replace(lost, first=3, stop=4)]))
    assert found(tmp_path, deep=True) == ()

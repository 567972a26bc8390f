"""Retries: exactly the rows that failed, each once, and nothing of round 0 is touched."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.shards import SourceFile
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.plan import PLAN_NAME, Plan
from gc2ray.output.planner import store_plan
from gc2ray.output.retry import DEAD, FAILURES, Retry, latest_failures, next_retry
from gc2ray.output.run_directory import RUN_NAME
from gc2ray.output.verify import verify
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.run import run_retry
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine
from tests.support.outputs import (
    FILES,
    all_ok,
    first_plan,
    latest_answers,
    parts,
    random_outcome,
    write_round,
)
from tests.support.rows import make_job, question_list, write_rows

EVERY_ROW = [(file.source, row) for file in FILES for row in range(file.rows)]


def planned_rows(plan: Plan) -> list[tuple[str, int]]:
    return [place for shard in plan.shards for place in shard.row_ids()]


def failed(output: Path, failures: tuple[str, ...] = FAILURES) -> list[tuple[str, int]]:
    """Rows to answer anew, in plain loops."""
    latest = latest_answers(output).values()
    answered = {(answer["source"], answer["row"]) for answer in latest}
    bad = {(a["source"], a["row"]) for a in latest if a["status"] in failures}
    return [
        place for place in EVERY_ROW if place in bad or (DEAD in failures and place not in answered)
    ]


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 10**6),
    listed=st.booleans(),
    shard_rows=st.integers(1, 9),
    chosen=st.lists(
        st.sets(st.sampled_from(["failed", "bad_image", DEAD]), min_size=1), min_size=1, max_size=3
    ),
)
def test_a_retry_plans_the_rows_whose_latest_answer_failed(
    *, seed: int, listed: bool, shard_rows: int, chosen: list[set[str]]
) -> None:
    """Retry after retry, each for failures of its own, some of its shards dead."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        plan, outcome = first_plan(shard_rows=shard_rows), random_outcome(seed, 0, listed=listed)
        write_round(output, 0, plan, outcome, listed=listed)
        for failures in chosen:
            expected = failed(output, tuple(failures))
            retry = next_retry(str(output), failures)
            if retry is None:
                assert expected == []
                continue
            assert planned_rows(retry.plan) == expected
            outcome = random_outcome(seed, retry.number, listed=listed)
            write_round(output, retry.number, retry.freeze(), outcome, listed=listed)
            assert verify(str(output), deep=True).damage == ()
            latest = latest_answers(output).values()
            bad = sum(answer["status"] != "ok" for answer in latest)
            assert latest_failures(str(output)) == (len(latest), bad)


def some_fail(source: str, row: int) -> list[Status] | None:
    """Rows 2 and 3 fail, each in its way; row 6 takes its shard with it."""
    bad = {2: [Status.FAILED], 3: [Status.BAD_IMAGE], 6: None}
    return bad.get(row, [Status.OK])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_round(tmp_path, 0, first_plan(), some_fail)
    return tmp_path


def begin_retry(output: Path, **options: tuple[str, ...]) -> Retry:
    retry = next_retry(str(output), **options)
    assert retry is not None
    return retry


@pytest.mark.parametrize(
    ("failures", "rows"),
    [
        (("failed",), [("a.parquet", 2), ("d/b.parquet", 2)]),
        (("bad_image",), [("a.parquet", 3), ("d/b.parquet", 3)]),
        (
            (DEAD,),
            [("a.parquet", 5), ("a.parquet", 6), *(("d/b.parquet", row) for row in (4, 5, 6))],
        ),
    ],
)
def test_the_requested_failures_are_planned(
    output: Path, failures: tuple[str, ...], rows: list[tuple[str, int]]
) -> None:
    retry = begin_retry(output, failures=failures)
    assert (retry.number, retry.begun, planned_rows(retry.plan)) == (1, False, rows)
    assert retry.plan.recipe_fingerprint == first_plan().recipe_fingerprint
    assert retry.plan.kept_columns == first_plan().kept_columns


def test_nothing_failed(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan())
    assert next_retry(str(tmp_path)) is None


def test_only_other_failures(output: Path) -> None:
    assert next_retry(str(output), ["too_long"]) is None


def test_an_unknown_failure(output: Path) -> None:
    with pytest.raises(
        ConfigError, match="--status 'bad': is not a failure; choose from bad_image, bad_"
    ):
        next_retry(str(output), ["failed", "bad"])
    with pytest.raises(ConfigError, match="status 'ok'"):
        next_retry(str(output), ["ok"])


def test_a_run_that_is_not_finished_is_finished_first(output: Path) -> None:
    parts(output)[0].unlink()
    with pytest.raises(ConfigError, match="1 shards are not answered yet; run again, then retry"):
        next_retry(str(output))


def test_a_damaged_output_is_not_retried(output: Path) -> None:
    parts(output)[0].write_bytes(b"garbage")
    with pytest.raises(
        ConfigError, match=r"not a part that gc2ray wrote.*`gc2ray verify` for details"
    ):
        next_retry(str(output))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run here"):
        next_retry(str(tmp_path))


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_round_0_stays_as_it_was(output: Path) -> None:
    before = digests(output)
    for _ in range(2):
        retry = begin_retry(output)
        write_round(output, retry.number, retry.freeze(), some_fail)
    after = digests(output)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("retry_rounds/") for name in after.keys() - before.keys())
    assert begin_retry(output).number == 3


def test_a_retry_that_is_not_finished_is_resumed(output: Path) -> None:
    retry = begin_retry(output)
    frozen = retry.freeze()
    assert (output / "retry_rounds/1" / RUN_NAME).exists()
    again = begin_retry(output, failures=("too_long",))
    assert (again.number, again.begun, again.plan) == (1, True, frozen)
    assert again.freeze() == frozen
    write_round(output, 1, frozen, all_ok)
    assert next_retry(str(output)) is None


def test_a_retry_whose_shards_are_dead_is_finished(output: Path) -> None:
    retry = begin_retry(output, failures=("failed",))
    write_round(output, 1, retry.freeze(), lambda source, row: None)
    again = begin_retry(output, failures=("failed",))
    assert (again.number, again.begun, planned_rows(again.plan)) == (
        2,
        False,
        planned_rows(retry.plan),
    )


def test_a_plan_without_its_run_json_is_used(output: Path) -> None:
    """The process was killed between the two; or another start was faster."""
    left = begin_retry(output, failures=("failed",)).plan
    (output / "retry_rounds/1/plan").mkdir(parents=True)
    (output / "retry_rounds/1" / PLAN_NAME).write_bytes(left.to_bytes())
    retry = begin_retry(output)
    assert (retry.number, retry.begun) == (1, False)
    assert retry.plan != left
    assert retry.freeze() == left
    assert begin_retry(output).begun


@pytest.mark.parametrize(
    ("failing", "sizes"),
    [(3, [1] * 3), (16, [1] * 16), (20, [2] * 10), (300, [10] * 30)],
)
def test_shards_are_small_where_few_rows_failed(
    tmp_path: Path, failing: int, sizes: list[int]
) -> None:
    """And never larger than those of the run."""
    plan = first_plan([SourceFile("a.parquet", "fa", (10,) * 50)], 10)
    write_round(
        tmp_path, 0, plan, lambda source, row: [Status.FAILED if row < failing else Status.OK]
    )
    assert begin_retry(tmp_path).plan.shards.rows_each.tolist() == sizes


def test_an_output_on_remote_storage() -> None:
    """As a URL: nothing is a path."""
    output = "memory://retried/out"
    write_round(output, 0, first_plan(), some_fail)
    retry = next_retry(output + "/")
    assert retry is not None
    assert retry.store.uri == "memory://retried/out/retry_rounds/1"
    write_round(output, 1, retry.freeze())
    verdict = verify(output, deep=True)
    assert (verdict.problems, verdict.rows) == ((), 17)
    assert next_retry(output) is None
    verdict.rounds[0].round.store._fs.store.clear()


def test_a_refused_retry_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output with a round that was begun and never answered would be incomplete."""

    def refuse(*_: object) -> None:
        raise ConfigError("recipe.model.path: there is no model")

    monkeypatch.setattr("gc2ray.runner.run.check_model", refuse)
    write_round(tmp_path, 0, first_plan(), some_fail)
    with pytest.raises(ConfigError, match="there is no model"):
        run_retry(begin_retry(tmp_path), Cluster())
    assert not (tmp_path / "retry_rounds").exists()


def test_workers_answer_a_retry(tmp_path: Path) -> None:
    """Of rows with lists of prompts, some of which are null and stay so."""
    source = write_rows(tmp_path / "in/a.parquet", 20)
    job = make_job(
        "model", source, tmp_path / "out", input__keep=["id"], input__prompt={"column": "prompts"}
    )
    files, kept_columns = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, 6, kept_columns))
    answer(Worker(job, kept_columns, load=lambda job: EchoEngine(buffered=4)), plan)
    assert verify(job.output, deep=True).problems == ()
    bad = [row for row in range(20) if None in (question_list(row) or [None])]
    retry = begin_retry(tmp_path / "out")
    assert planned_rows(retry.plan) == [("a.parquet", row) for row in bad]
    again = retry.job(Cluster())
    assert again.recipe == job.recipe
    answer(
        Worker(again, kept_columns, retry_round=1, load=lambda job: EchoEngine()), retry.freeze()
    )
    verdict = verify(job.output, deep=True)
    assert (verdict.problems, [found.rows for found in verdict.rounds]) == ((), [20, len(bad)])
    assert begin_retry(tmp_path / "out").plan == retry.plan, "null prompts are bad for ever"


def answer(worker: Worker, plan: Plan) -> None:
    worker.load()
    with ThreadPoolExecutor(2) as callers:
        list(callers.map(lambda shard: worker.process(ShardAssignment(shard)), plan.shards))

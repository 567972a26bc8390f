"""The whole job on a real local Ray, broken on purpose: nothing is lost, nothing is doubled.

Each fault leaves a mark with the pid and the step it hit, and each test reads it: a kill that came
too late would fail the test, not pass it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from gc2ray.core.errors import ConfigError, GivenUp
from gc2ray.core.usage import UsageKind
from gc2ray.data.store import Store
from gc2ray.output.compact import compact
from gc2ray.output.parts import list_parts
from gc2ray.output.plan import Plan
from gc2ray.output.planner import Outcome, committed_parts, outcome
from gc2ray.output.retry import next_retry
from gc2ray.output.verify import verify
from gc2ray.reporting.terminal import print_outcome
from gc2ray.runner.run import run_job, run_retry
from tests.support.fakes import Counted, Fault, counted_worker, faulty_worker
from tests.support.ray_head import has_ended, until
from tests.support.rows import job_data, make_job, question_list, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]

ROWS = 240
SHARD_ROWS = 20


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One local Ray for the whole file; run_job uses the one that is up."""
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "in" / "a.parquet", ROWS, row_group=30)
    data = job_data("unused-hub-id", tmp_path / "in", tmp_path / "out")
    data["recipe"]["input"]["prompt"] = {"column": "prompt"}
    data["cluster"] |= {"shard_rows": SHARD_ROWS, "stall_seconds": 60.0, "cpus_per_worker": 0.5}
    path = tmp_path / "job.json"
    path.write_text(json.dumps(data))
    return path


def load(job_file: Path):
    from gc2ray.core.config.job import load_job

    return load_job(job_file)


def run(job_file: Path, fault: Fault | None = None) -> Outcome:
    return run_job(load(job_file), make_worker=partial(faulty_worker, fault=fault))


def committed_rows(job_file: Path) -> list[dict]:
    parts = sorted((Path(load(job_file).output) / "data").glob("*.parquet"))
    return [{**row, "part": part.name} for part in parts for row in pq.read_table(part).to_pylist()]


def assert_exactly_once(job_file: Path, missing: frozenset[int] = frozenset()) -> None:
    expected = Counter(f"a.parquet#{row}" for row in range(ROWS) if row not in missing)
    assert Counter(row["row_key"] for row in committed_rows(job_file)) == expected


def fired(marks: Path, kind: str) -> list[str]:
    return sorted(path.name for path in marks.iterdir() if path.name.startswith(f"{kind}-"))


# --- faults of a worker ------------------------------------------------------------------------


def test_a_whole_run_and_a_rerun(job_file: Path) -> None:
    result = run(job_file)
    assert (result.exit_code, result.rows) == (0, ROWS)
    assert_exactly_once(job_file)
    before = {path: path.stat().st_mtime_ns for path in (Path(load(job_file).output)).rglob("*")}
    assert run(job_file).exit_code == 0
    after = {path: path.stat().st_mtime_ns for path in (Path(load(job_file).output)).rglob("*")}
    assert after == before, "a finished run is not touched"


@pytest.mark.parametrize(
    ("where", "value"), [("row", 70), ("step", "written"), ("step", "committed")]
)
def test_a_killed_worker(job_file: Path, marks: Path, where: str, value: object) -> None:
    """In the middle of a shard; with the part written but not committed; committed but untold."""
    result = run(job_file, Fault("kill", marks, **{where: value}))
    (mark,) = fired(marks, "kill")
    assert str(value) in mark
    pid = int(mark.split("-")[-2])
    until(lambda: has_ended(pid))
    assert (result.exit_code, result.dead) == (0, ())
    assert_exactly_once(job_file)
    records = list((Path(load(job_file).output) / "workers").glob("*.json"))
    pids = {json.loads(record.read_text())["pid"] for record in records}
    assert pid in pids, "the one that died was one of ours"
    sid = mark.split("-")[2] if where == "step" else None
    attempts = {
        row["attempt"]
        for row in committed_rows(job_file)
        if (row["row"] == value if sid is None else sid in row["part"])
    }
    assert attempts == {1 if value == "committed" else 2}, "the kill hit another moment"


@pytest.fixture
def stalling_file(job_file: Path) -> Path:
    """Who says nothing for five seconds hangs; on a busy machine that may hit others, too."""
    data = json.loads(job_file.read_text())
    data["cluster"]["stall_seconds"] = 5.0
    job_file.write_text(json.dumps(data))
    return job_file


@pytest.fixture
def listed_file(job_file: Path) -> Path:
    """The same rows with lists of prompts, of which many are bad."""
    data = json.loads(job_file.read_text())
    data["recipe"]["input"] |= {"prompt": {"column": "prompts"}, "keep": ["id"]}
    data["cluster"]["max_bad_rows"] = 1.0
    job_file.write_text(json.dumps(data))
    return job_file


def test_a_killed_worker_between_the_prompts_of_a_row(
    listed_file: Path, marks: Path, tmp_path: Path
) -> None:
    """Every prompt of every row once, also of the row in which it died; `datasets` reads them."""
    from datasets import load_dataset

    questions = {row: question_list(row) or [None] for row in range(ROWS)}
    assert len(questions[74]) == 4
    result = run(listed_file, Fault("kill", marks, row=74, prompt_index=2))
    assert len(fired(marks, "kill")) == 1
    assert (result.exit_code, result.rows, result.planned_rows) == (0, ROWS, ROWS)
    answers = sum(map(len, questions.values()))
    assert result.stats.rows == answers > ROWS
    rows = load_dataset(
        "parquet",
        data_files=str(tmp_path / "out/data/*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert len(rows) == answers
    found = list(zip(rows["row"], rows["prompt_index"], rows["answer"], strict=True))
    expected = [(row, i, text) for row in range(ROWS) for i, text in enumerate(questions[row])]
    assert found == expected, "in order of the input, shard by shard"
    assert rows["row_key"] == [f"a.parquet#{row}#{index}" for row, index, _ in expected]
    assert rows["id"] == rows["row"]
    assert {a for r, a in zip(rows["row"], rows["attempt"], strict=True) if r == 74} == {2}
    console = Console(record=True, width=120)
    print_outcome(console, result, "out")
    shown = console.export_text()
    assert "240 of 240" in shown
    assert re.search(rf"answers +│ +{answers} ", shown)
    assert run(listed_file).exit_code == 0, "a finished run is seen to be one"


def poisoned(job_file: Path) -> list[tuple[int, str]]:
    """Rows that were not answered, and what is written for them."""
    rows = committed_rows(job_file)
    return [(row["row"], row["status"]) for row in rows if row["status"] != "ok"]


@pytest.mark.parametrize("kind", ["kill", "segfault", "exit"])
def test_a_row_that_kills_every_process_fails_alone(job_file: Path, marks: Path, kind: str) -> None:
    """Its first death leaves suspects, which go alone; two more name it."""
    result = run(job_file, Fault(kind, marks, row=70, once=False))
    assert len(fired(marks, kind)) == 3
    assert (result.exit_code, result.dead) == (0, ())
    assert poisoned(job_file) == [(70, "killed_worker")]
    assert_exactly_once(job_file)
    assert result.stats.by_status == {"ok": ROWS - 1, "killed_worker": 1}


def test_more_killing_rows_than_allowed_cost_their_shard(job_file: Path, marks: Path) -> None:
    data = json.loads(job_file.read_text())
    data["cluster"]["max_poison_rows"] = 0
    job_file.write_text(json.dumps(data))
    result = run(job_file, Fault("kill", marks, row=70, once=False))
    assert len(fired(marks, "kill")) == 3
    assert result.exit_code == 1
    assert_exactly_once(job_file, missing=frozenset(range(60, 75)))
    (letter,) = result.dead
    assert "(15 rows): more than 0 of its rows kill or hang their worker" in letter


def test_failed_rows_are_retried_in_a_round_of_their_own(
    job_file: Path, marks: Path, tmp_path: Path
) -> None:
    """A row that killed, and a shard that was given up: both are answered, and nothing else is."""
    data = json.loads(job_file.read_text())
    data["cluster"]["max_poison_rows"] = 0
    job_file.write_text(json.dumps(data))
    output = load(job_file).output
    assert run(job_file, Fault("kill", marks, row=70, once=False)).exit_code == 1
    before = {path: path.read_bytes() for path in (Path(output) / "data").iterdir()}
    retry = next_retry(output)
    assert retry is not None
    assert (retry.number, retry.plan.rows) == (1, 15)
    result = run_retry(retry, load(job_file).cluster, make_worker=faulty_worker).outcome
    assert (result.exit_code, result.rows) == (0, 15)
    assert {path: path.read_bytes() for path in (Path(output) / "data").iterdir()} == before
    assert verify(output, deep=True).exit_code == 0
    assert next_retry(output) is None
    dataset = compact(output, str(tmp_path / "compacted"))
    rows = pq.read_table(tmp_path / "compacted").to_pylist()
    assert (dataset.rows, dataset.failed) == (ROWS, 0)
    assert [row["row"] for row in rows] == list(range(ROWS))
    assert {row["retry_round"] for row in rows if 60 <= row["row"] < 75} == {1}
    assert {row["retry_round"] for row in rows if not 60 <= row["row"] < 75} == {0}


def test_a_shard_that_hangs_once(stalling_file: Path, marks: Path) -> None:
    result = run(stalling_file, Fault("hang", marks, row=70))
    (mark,) = fired(marks, "hang")
    until(lambda: has_ended(int(mark.split("-")[-2])))  # the hanging process
    assert result.exit_code == 0
    assert_exactly_once(stalling_file)


@pytest.mark.slow
def test_a_row_that_always_hangs(stalling_file: Path, marks: Path) -> None:
    result = run(stalling_file, Fault("hang", marks, row=70, once=False))
    assert len(fired(marks, "hang")) == 3
    assert (result.exit_code, result.dead) == (0, ())
    assert poisoned(stalling_file) == [(70, "timeout")]
    assert_exactly_once(stalling_file)


def test_an_engine_that_breaks_once(job_file: Path, marks: Path) -> None:
    result = run(job_file, Fault("raise", marks, row=70))
    assert len(fired(marks, "raise")) == 1
    assert result.exit_code == 0
    assert_exactly_once(job_file)


@pytest.mark.slow
@pytest.mark.alone
def test_device_time_adds_up_to_what_was_spent(job_file: Path, marks: Path) -> None:
    """Five kills; useful and wasted device-seconds within 5% of the test's own count."""
    counted = Counted(marks, frozenset({9, 52, 99, 144, 190}), row_seconds=0.25, load_seconds=3.0)
    result = run_job(load(job_file), make_worker=partial(counted_worker, counted=counted))
    assert (result.exit_code, result.rows) == (0, ROWS)
    assert_exactly_once(job_file)
    pids = [int(path.read_text()) for path in marks.glob("killed-*")]
    assert len({*pids}) == 5
    until(lambda: all(map(has_ended, pids)))
    useful, wasted = counted.seconds()
    assert useful > ROWS * counted.row_seconds
    assert wasted > 2.0, "the kills cost nothing"
    device_time = result.usage
    assert device_time.seconds_for(UsageKind.USEFUL) == pytest.approx(useful, rel=0.05)
    assert device_time.seconds_for(UsageKind.DIED) == pytest.approx(wasted, rel=0.05)
    assert device_time.seconds_for(UsageKind.LOADING) == pytest.approx(
        counted.loads() * counted.load_seconds, rel=0.05
    )
    console = Console(record=True, width=160)
    print_outcome(console, result, "out")
    assert re.search(r"device seconds, wasted +│ .*loading .*died ", console.export_text())


# --- faults of the driver ----------------------------------------------------------------------

DRIVER = """
import sys
from functools import partial
from pathlib import Path
from gc2ray.core.config.job import load_job
from gc2ray.runner.run import run_job
from tests.support.fakes import Fault, faulty_worker
import os
job_file, marks, step, address = sys.argv[1:5]
fault = Fault("kill_driver", Path(marks), step=step, driver_pid=os.getpid(), seconds=0.01)
make_worker = partial(faulty_worker, fault=fault)
run_job(load_job(Path(job_file)), address=address, make_worker=make_worker)
"""


def test_a_killed_driver(job_file: Path, marks: Path) -> None:
    """Killed by a worker that has just read a shard; it lives on a little, and the rerun overlaps.

    Those of later steps, and of many drivers in a row, are in `test_chaos`.
    """
    step, address = "read", ray.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", DRIVER, str(job_file), str(marks), step, address]
    driver = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr[-2000:]
    (mark,) = fired(marks, "kill_driver")
    assert step in mark
    store = Store(load(job_file).output)
    at_kill = len(list_parts(store))
    plan = Plan.from_bytes(store.read("plan/0000.parquet") or b"")
    assert at_kill < len(plan.shards), "killed too late to mean anything"
    result = run(job_file)
    assert (result.exit_code, result.rows) == (0, ROWS)
    assert_exactly_once(job_file)
    assert outcome(store, plan, committed_parts(store, plan)).rows == ROWS


def test_new_files_extend_a_finished_run(job_file: Path) -> None:
    """What was answered stays as it is; a file that changed is refused."""
    job = load(job_file)
    assert run(job_file).exit_code == 0
    source, output = Path(job.recipe.input.uris()[0]), Path(job.output)
    before = {path: path.read_bytes() for path in (output / "data").iterdir()}
    write_rows(source / "b.parquet", 30, row_group=10)
    assert run(job_file).planned_rows == ROWS, "not asked for"
    result = run_job(job, make_worker=partial(faulty_worker, fault=None), extend=True)
    assert (result.exit_code, result.rows, result.planned_rows) == (0, ROWS + 30, ROWS + 30)
    assert {path: path.read_bytes() for path in before} == before
    assert verify(job.output, deep=True).problems == ()
    again = run_job(job, make_worker=partial(faulty_worker, fault=None), extend=True)
    assert (again.exit_code, again.planned_rows) == (0, ROWS + 30)
    assert len(list((output / "plan").iterdir())) == 2
    compact(job.output, f"{job.output}-whole")
    assert len(pq.read_table(f"{job.output}-whole")) == ROWS + 30
    write_rows(source / "b.parquet", 31, row_group=10)
    with pytest.raises(ConfigError, match=r"--extend: b\.parquet changed since it was planned"):
        run_job(job, make_worker=partial(faulty_worker, fault=None), extend=True)


@pytest.mark.slow
def test_a_kill_between_plan_and_run_json(job_file: Path) -> None:
    """A start that got no further than the plan file is picked up by the next one."""
    assert run(job_file).exit_code == 0
    output = Path(load(job_file).output)
    (output / "run.json").unlink()
    for part in (output / "data").iterdir():
        part.unlink()
    assert run(job_file).exit_code == 0
    assert_exactly_once(job_file)


def test_an_input_without_rows_is_done_at_once(job_file: Path) -> None:
    """Calibrated or not, there is nothing to measure and nothing to wait for."""
    data = json.loads(job_file.read_text())
    write_rows(Path(data["recipe"]["input"]["uri"]) / "a.parquet", 0)
    data["cluster"]["shard_rows"] = None
    job_file.write_text(json.dumps(data))
    result = run(job_file)
    assert (result.exit_code, result.rows, result.planned_shards) == (0, 0, 0)
    assert run(job_file).exit_code == 0


# --- configuration -----------------------------------------------------------------------------


def test_a_changed_recipe_is_refused(job_file: Path) -> None:
    assert run(job_file).exit_code == 0
    data = json.loads(job_file.read_text())
    data["recipe"]["compression"]["retention"] = 0.5
    job_file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"compression\.retention: 0\.25 \(stored\) -> 0\.5"):
        run(job_file)
    assert_exactly_once(job_file)


def test_a_corrupt_part_is_named(job_file: Path) -> None:
    assert run(job_file).exit_code == 0
    part = sorted((Path(load(job_file).output) / "data").iterdir())[0]
    part.write_bytes(b"garbage")
    with pytest.raises(ConfigError, match=part.name):
        run(job_file)


def test_a_full_cluster_is_reported_with_what_is_lacking(job_file: Path) -> None:
    data = json.loads(job_file.read_text())
    data["cluster"] |= {"cpus_per_worker": 1, "gpus_per_worker": 4, "place_seconds": 2}
    job_file.write_text(json.dumps(data))
    lacking = "no room for a worker within 2 s: a worker needs 1 CPU, 4 GPU"
    with pytest.raises(GivenUp, match=lacking):
        run(job_file)


def test_real_model_end_to_end(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    """Calibration, two workers, the real engine; read with datasets.load_dataset."""
    from datasets import load_dataset

    source = write_rows(tmp_path / "in" / "a.parquet", 30)
    job = make_job(
        tiny_paths["vicuna"],
        source,
        tmp_path / "out",
        input__keep=["id"],
        cluster__cpus_per_worker=0.5,
    )
    result = run_job(job)
    assert (result.exit_code, result.rows) == (0, 30)
    assert result.stats.by_status == {"ok": 30}
    rows = load_dataset(
        "parquet",
        data_files=str(tmp_path / "out/data/*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert sorted(rows["id"]) == list(range(30))
    assert sum(rows["visual_tokens_kept"]) == result.stats.visual_tokens_kept > 0
    assert sum(rows["encode_ns"]) == result.stats.stage_ns["encode"] > 0

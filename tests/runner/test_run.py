"""A run before Ray is joined: what it refuses, and what it tells of an output that is there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gc2ray import __version__
from gc2ray.cli.app import app
from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.errors import ConfigError
from gc2ray.data.source import Source
from gc2ray.data.store import Store
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from gc2ray.output.retry import next_retry
from gc2ray.output.run_directory import RUN_NAME
from gc2ray.runner.run import run_job, run_retry
from gc2ray.runner.worker import Worker
from tests.output.test_retry import answer
from tests.support.fakes import EchoEngine
from tests.support.methods import SOURCE, write_method
from tests.support.outputs import with_footer
from tests.support.ray_head import until
from tests.support.rows import make_job, write_rows
from tests.support.sources import write


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(_: object) -> None:
        raise AssertionError("Ray is joined")

    monkeypatch.setattr("gc2ray.runner.run.ray_session.connected", connected)


@pytest.fixture
def job(tmp_path: Path, tiny_paths: dict[str, Path]) -> Job:
    write_rows(tmp_path / "in/a.parquet", 6)
    prompt = {"column": "prompt"}
    model = tiny_paths["vicuna"]
    return make_job(model, tmp_path / "in", tmp_path / "out", input__prompt=prompt)


def answered(job: Job, shard_rows: int = 3) -> Plan:
    files, kept_columns = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, shard_rows, kept_columns))
    worker = Worker(job, kept_columns, load=lambda job: EchoEngine())
    answer(worker, plan)
    until(lambda: Store(job.output).read(f"workers/{worker.uuid}.json"))  # written by a thread
    return plan


def with_method(job: Job) -> Job:
    """The same, read again, with a method of one's own."""
    data = job.model_dump(mode="json")
    data["recipe"]["compression"] = {"method": "own_method:Own", "allow_code": True}
    return parse_job(data)


def kept(job: Job, *names: object) -> Job:
    return make_job(
        job.recipe.model.path, str(job.recipe.input.uri), job.output, input__keep=list(names)
    )


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["in/out", "in", "in/../in/out", "link/out"])
def test_an_output_in_its_input_is_refused(job: Job, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    inside = job.model_copy(update={"output": f"{tmp_path}/{place}"})
    with pytest.raises(ConfigError, match=r"lies where recipe\.input\.uri would take its files"):
        run_job(inside)
    for folder in ("plan", "data"):
        assert not (tmp_path / "in" / folder).exists()


@pytest.mark.parametrize("place", ["in/_out", "out"])
def test_an_output_beside_its_input_is_accepted(job: Job, tmp_path: Path, place: str) -> None:
    with pytest.raises(AssertionError, match="Ray is joined"):
        run_job(job.model_copy(update={"output": f"{tmp_path}/{place}"}))


def test_a_column_that_cannot_be_written_is_refused(job: Job, tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"], "gap": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as stream,
    ):
        stream.write_table(table)
    path = job.recipe.model.path
    other = make_job(path, tmp_path / "a.arrow", tmp_path / "out", input__keep=["gap"])
    with pytest.raises(ConfigError, match=r"keep: column 'gap' is month_day_nano_interval"):
        run_job(other)


def of_another_version(output: Path, version: str, run_format: int) -> None:
    run = output / RUN_NAME
    content = json.loads(run.read_text())
    content["versions"]["gc2ray"] = version
    run.write_text(json.dumps({**content, "format": run_format}))


def older_run(output: Path) -> str:
    of_another_version(output, "0.1.0", 2)
    return f"begun by an older gc2ray, 0.1.0 (format 2); this is {__version__} (format 3)"


def newer_run(output: Path) -> str:
    of_another_version(output, "9.0.0", 9)
    return f"begun by a newer gc2ray, 9.0.0 (format 9); this is {__version__} (format 3)"


def older_part(output: Path) -> str:
    part = sorted(output.glob("data/*"))[1]
    with_footer(part, {b"gc2ray.schema_version": b"1"})
    return f"{part.name}: written by another version of gc2ray (schema 1, this one has 4)"


def part_before_versions(output: Path) -> str:
    part = sorted(output.glob("data/*"))[1]
    table = pq.read_table(part)
    metadata = dict(table.schema.metadata)
    del metadata[b"gc2ray.schema_version"]
    pq.write_table(table.replace_schema_metadata(metadata), part)
    return f"{part.name}: written by another version of gc2ray (schema unknown, this one has 4)"


@pytest.mark.parametrize("change", [older_run, newer_run, older_part, part_before_versions])
def test_an_output_of_another_version_is_refused_by_every_command(
    job: Job, tmp_path: Path, change: Callable[[Path], str]
) -> None:
    """In one line, with exit code 2, and nothing is changed."""
    answered(job)
    reported = change(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    file = tmp_path / "job.yaml"
    file.write_text(job.to_yaml())
    commands: list[list[Any]] = [
        ["run", file],
        ["status", job.output],
        ["verify", job.output],
        ["verify", job.output, "--deep"],
        ["retry", job.output],
        ["compact", job.output, tmp_path / "whole"],
        ["report", job.output, "--to", tmp_path / "report"],
    ]
    for command in commands:
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 2, command
        assert reported in " ".join(result.output.split()), command
        assert result.output.count("\n") <= 2, command
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])


def test_a_run_whose_method_has_another_source_is_not_resumed(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = write_method(tmp_path, "own_method")
    job = with_method(job)
    answered(job)
    assert run_job(job).exit_code == 0  # it is whole
    path.write_text(SOURCE + "# changed\n")
    with pytest.raises(ConfigError) as caught:
        run_job(with_method(job))
    first, *others = str(caught.value).splitlines()
    assert first.startswith("the output directory belongs to another recipe")
    assert [line.split()[0] for line in others] == ["recipe.compression.source_sha256:"]


def test_a_method_that_is_gone_is_refused_before_ray(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe is that of the output, as a retry's."""
    monkeypatch.syspath_prepend(tmp_path)
    path = write_method(tmp_path, "own_method")
    job = with_method(job)
    path.unlink()
    with pytest.raises(ConfigError, match=r"recipe\.compression\.method: no module 'own_method'"):
        run_job(job)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("Another = 1", "own_method.py has no class 'Own'"),
        ("class Own:", "own_method.py is not valid Python"),
    ],
)
def test_a_method_without_its_class_is_refused_before_ray(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str
) -> None:
    def started(_: str | None) -> None:
        pytest.fail("Ray was started")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("gc2ray.runner.ray_session.connected", started)
    write_method(tmp_path, "own_method", source)
    with pytest.raises(ConfigError, match=f"recipe.compression.method: .*{re.escape(reason)}"):
        run_job(with_method(job))


# --- reported -------------------------------------------------------------------------------------


def test_new_files_are_reported_where_they_are_not_planned(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answered(job)
    write(tmp_path / "in/empty.parquet", image=pa.array([], pa.binary()), prompt=pa.nulls(0))
    assert run_job(job).exit_code == 0
    assert caplog.messages == []
    write_rows(tmp_path / "in/b.parquet", 2)
    (tmp_path / "in/c.parquet").write_bytes(b"half a file")
    result = run_job(job)
    assert (result.exit_code, result.planned_rows) == (0, 6)
    (message,) = caplog.messages
    assert message == (
        "2 input files are new since the run began (b.parquet); add them with --extend"
    )


def test_a_finished_run_needs_no_input(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered(job)
    (tmp_path / "in/a.parquet").unlink()
    assert run_job(job).exit_code == 0
    assert caplog.messages == []

    def fails(*_: object) -> None:
        raise ConfigError("recipe.input.uri: no answer")

    monkeypatch.setattr(Source, "unplanned", fails)
    assert run_job(job).exit_code == 0
    (message,) = caplog.messages
    assert message.endswith("new input files: recipe.input.uri: no answer")


def test_a_retry_reports_no_new_files(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its plan has few of them, and that is as it should be."""
    write(tmp_path / "in/b.parquet", image=[b"x"], prompt=[" "])
    answered(job)
    retry = next_retry(job.output)
    assert retry is not None
    with pytest.raises(AssertionError, match="Ray is joined"):
        run_retry(retry, job.cluster)
    assert not [message for message in caplog.messages if "new since" in message]


def test_a_narrower_type_in_new_files_extends_a_run(job: Job, tmp_path: Path) -> None:
    """What is planned has room for it; what it has no room for is refused."""
    wide = kept(job, "id")
    answered(wide)
    table = pq.read_table(tmp_path / "in/a.parquet")
    (tmp_path / "in/a.parquet").unlink()
    narrow = table.set_column(0, "id", table["id"].cast(pa.int16()))
    pq.write_table(narrow, tmp_path / "in/b.parquet")
    with pytest.raises(AssertionError, match="Ray is joined"):
        run_job(wide, extend=True)
    assert len(list((tmp_path / "out/plan").iterdir())) == 2
    pq.write_table(
        table.set_column(0, "id", table["id"].cast(pa.string())), tmp_path / "in/c.parquet"
    )
    (tmp_path / "in/b.parquet").unlink()
    with pytest.raises(ConfigError, match="id string, those of planned files id int64"):
        run_job(wide, extend=True)


def test_a_renamed_column_is_written_under_its_name(job: Job, tmp_path: Path) -> None:
    table = pq.read_table(tmp_path / "in/a.parquet")
    table = table.append_column("answer", pa.array([["a"], None, ["b", "c"], [], ["d"], ["e"]]))
    pq.write_table(table, tmp_path / "in/a.parquet")
    renamed = kept(job, {"answer": "reference"}, "id")
    answered(renamed)
    parts = sorted((tmp_path / "out/data").iterdir())
    written = pa.concat_tables([pq.read_table(part) for part in parts])
    assert written.column_names[:2] == ["reference", "id"]
    assert written["reference"].to_pylist() == table["answer"].to_pylist()
    scored = CliRunner().invoke(app, ["verify", renamed.output, "--deep"])
    assert scored.exit_code == 0

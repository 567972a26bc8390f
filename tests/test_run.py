"""A run before Ray is joined: what it refuses, and what it tells of an output that is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from gc2ray.cli import app
from gc2ray.config import Job
from gc2ray.manifest import RUN_NAME, Plan
from gc2ray.planner import store_plan
from gc2ray.sources.source import Source
from gc2ray.store import Store
from gc2ray.worker import Worker
from tests.fakes import EchoEngine
from tests.outputs import with_footer
from tests.rows import make_job, write_rows
from tests.test_retry import answer


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(_: object) -> None:
        raise AssertionError("Ray is joined")

    monkeypatch.setattr("gc2ray.run.ray_pool.connected", connected)


@pytest.fixture
def job(tmp_path: Path, tiny_paths: dict[str, Path]) -> Job:
    write_rows(tmp_path / "in/a.parquet", 6)
    prompt = {"column": "prompt"}
    model = tiny_paths["vicuna"]
    return make_job(model, tmp_path / "in", tmp_path / "out", input__prompt=prompt)


def answered(job: Job, shard_rows: int = 3) -> Plan:
    files, carried = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, shard_rows, carried))
    answer(Worker(job, carried, load=lambda job: EchoEngine()), plan)
    return plan


# --- refused ------------------------------------------------------------------------------------


def older_run(output: Path) -> str:
    run = output / RUN_NAME
    run.write_text(json.dumps({**json.loads(run.read_text()), "format": 1}))
    return "begun by an older gc2ray, 0.1.0 (format 1); this is 0.1.0 (format 2)"


def newer_run(output: Path) -> str:
    run = output / RUN_NAME
    run.write_text(json.dumps({**json.loads(run.read_text()), "format": 9}))
    return "begun by a newer gc2ray, 0.1.0 (format 9); this is 0.1.0 (format 2)"


def older_part(output: Path) -> str:
    part = sorted(output.glob("data/*"))[1]
    with_footer(part, {b"gc2ray.schema_version": b"1"})
    return f"{part.name}: written by another version of gc2ray (schema 1, this one has 3)"


def part_before_versions(output: Path) -> str:
    part = sorted(output.glob("data/*"))[1]
    table = pq.read_table(part)
    metadata = dict(table.schema.metadata)
    del metadata[b"gc2ray.schema_version"]
    pq.write_table(table.replace_schema_metadata(metadata), part)
    return f"{part.name}: written by another version of gc2ray (schema unknown, this one has 3)"


@pytest.mark.parametrize("change", [older_run, newer_run, older_part, part_before_versions])
def test_an_output_of_another_version_is_refused_by_every_command(
    job: Job, tmp_path: Path, change: Callable[[Path], str]
) -> None:
    """In one line, with exit code 2, and nothing is changed."""
    answered(job)
    told = change(tmp_path / "out")
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
        assert told in " ".join(result.output.split()), command
        assert result.output.count("\n") <= 2, command
    assert sorted(tmp_path.rglob("*")) == sorted([*before, file])

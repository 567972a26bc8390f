"""A job: its cluster, its paths on other machines, and the YAML it is written to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gc2ray.core.config.job import Cluster, Job, WorkerRange, load_cluster, load_job, parse_job
from gc2ray.core.errors import ConfigError
from tests.support.rows import job_data, make_job


def test_a_cluster_is_loaded_from_overrides_alone() -> None:
    assert load_cluster(["cluster.workers=3"]) == Cluster(workers=3)
    assert load_cluster([]) == Cluster()
    for override, message in [
        ("recipe.model.path=x", "only cluster.* may be set"),
        ("cluster.worker=3", "cluster.worker: unknown 'worker'; did you mean 'workers'?"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_cluster([override])


def test_a_number_of_workers_is_a_maximum() -> None:
    assert Cluster(workers=3).workers == WorkerRange(min=1, max=3)
    assert Cluster(workers={"min": 2, "max": 9}).workers == WorkerRange(min=2, max=9)
    assert Cluster().workers is None


def test_a_job_needs_no_cluster() -> None:
    data = job_data("model", "in", "out")
    del data["cluster"]
    assert parse_job(data) == Job(output="out", recipe=parse_job(data).recipe, cluster=Cluster())


def test_local_paths_are_made_absolute_and_urls_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    data = job_data("model", "in/*.parquet", "out")
    data["recipe"]["input"]["image_roots"] = ["photos", "s3://bucket/photos"]
    located = parse_job(data).located()
    assert located.output == f"{tmp_path}/out"
    assert located.recipe.model.path == f"{tmp_path}/model"
    assert located.recipe.input.uri == f"{tmp_path}/in/*.parquet"
    assert located.recipe.input.image_roots == (f"{tmp_path}/photos", "s3://bucket/photos")
    for model in ("somebody/model", "s3://bucket/model", "zip://model::s3://bucket/model.zip"):
        remote = parse_job(job_data(model, "s3://bucket/in", "s3://bucket/out"))
        assert remote.located() == remote


def test_a_model_in_the_home_directory_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    job = parse_job(job_data("~/model", "in", "out"))
    assert job.located().recipe.model.path == f"{tmp_path}/model"
    assert parse_job(job_data("./m", "in", "out")).located().recipe.model.path == str(
        Path("m").absolute()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "in/*.parquet"}, "recipe.input.uri: 'in/*.parquet'"),
        (
            {"input__image_roots": ["s3://images", "~/images"]},
            "recipe.input.image_roots: '~/images'",
        ),
        ({"model": "./model"}, "recipe.model.path: './model'"),
        ({"output": "out"}, "output: 'out'"),
    ],
)
def test_local_paths_are_not_portable(changes: dict[str, object], message: str) -> None:
    places = {"model": "hub/model", "source": "/data/in", "output": "s3://bucket/out"}
    make_job(**places).check_portable()
    job = make_job(**{**places, **changes})
    with pytest.raises(ConfigError, match=re.escape(message)):
        job.check_portable()


def test_a_job_written_as_yaml_is_read_back_the_same(tmp_path: Path) -> None:
    job = make_job("hub/model", "/data/in", "s3://bucket/out", compression__retention=0.1)
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    assert load_job(tmp_path / "job.yaml") == job

"""Manifests for clusters: as far as their schemas are at hand, and Slurm's by running it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml

from gc2ray.core.config.job import Job, load_job
from gc2ray.data.store import Store
from gc2ray.output.parts import list_parts
from gc2ray.output.verify import verify
from tests.support.commands import run_command
from tests.support.ray_head import has_ended, until
from tests.support.rows import job_data, write_rows

FOLDER = Path(__file__).parents[2] / "configs" / "cluster"
PROGRAMS = Path(sys.executable).parent
KUBERNETES = "1.33"
KEYS = {  # of KubeRay 1.3's custom resources, as far as they are used
    "spec": {
        "entrypoint",
        "submissionMode",
        "backoffLimit",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "rayClusterSpec",
    },
    "cluster": {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"},
    "head": {"rayStartParams", "template"},
    "workers": {
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "rayStartParams",
        "template",
    },
}


@pytest.fixture
def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap with the job, and the RayJob."""
    first, second = yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())
    return first, second


def job_in(config_map: dict[str, Any], folder: Path) -> Job:
    (folder / "job.yaml").write_text(config_map["data"]["job.yaml"])
    return load_job(folder / "job.yaml")


def groups(ray_job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_job_has_the_keys_of_its_schema(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    _, ray_job = documents
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    spec = ray_job["spec"]
    cluster = spec["rayClusterSpec"]
    assert {*spec} <= KEYS["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert {*cluster} <= KEYS["cluster"]
    assert {*cluster["headGroupSpec"]} == KEYS["head"]
    for group in cluster["workerGroupSpecs"]:
        assert {*group} == KEYS["workers"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(ray_job):
        params = group["rayStartParams"]
        assert all(isinstance(value, str) for value in params.values())
        assert params["metrics-export-port"] == "8080"


def test_its_pods_and_its_job_file_are_valid(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    config_map, ray_job = documents
    kubernetes_validate.validate(config_map, KUBERNETES, strict=True)
    for group in groups(ray_job):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_its_job_fits_its_pods(
    documents: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    config_map, ray_job = documents
    job = job_in(config_map, tmp_path)
    job.check_portable()
    (group,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    asked = pod["containers"][0]["resources"]["requests"]
    assert int(asked["nvidia.com/gpu"]) == job.cluster.gpus_per_worker
    assert int(asked["cpu"]) >= job.cluster.cpus_per_worker
    assert job.cluster.drain_seconds < pod["terminationGracePeriodSeconds"]
    assert job.cluster.workers is not None
    assert job.cluster.workers.max == group["maxReplicas"]


def test_its_entrypoint_is_a_gc2ray_command(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    config_map, ray_job = documents
    program, *words = ray_job["spec"]["entrypoint"].split()
    head = ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert program == "gc2ray"
    assert words[-1] == f"{mount['mountPath']}/job.yaml"
    (volume,) = head["volumes"]
    assert (volume["name"], volume["configMap"]["name"]) == (
        mount["name"],
        config_map["metadata"]["name"],
    )
    result = run_command(*words[:-1], "--help")
    assert result.exit_code == 0


# --- Slurm --------------------------------------------------------------------------------------

STUBS = {
    "scontrol": '#!/bin/bash\n[[ "$1 $2" == "show hostnames" ]] && echo 127.0.0.1\n',
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
}


def test_the_script_is_clean() -> None:
    script = str(FOLDER / "slurm.sh")
    found = subprocess.run(
        [PROGRAMS / "shellcheck", script], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout) == (0, "")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm job of two nodes, which are both this one."""
    for name in ("scontrol", "srun"):
        (tmp_path / name).write_text(STUBS[name])
        (tmp_path / name).chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield {
            **os.environ,
            "PATH": f"{tmp_path}:{PROGRAMS}:{os.environ['PATH']}",
            "RAY_TMPDIR": folder,
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(480)
@pytest.mark.parametrize("stopped", [False, True])
def test_the_script_runs_a_job_and_ends_what_it_started(
    slurm: dict[str, str], tmp_path: Path, tiny_paths: dict[str, Path], *, stopped: bool
) -> None:
    """Slurm's signal before the time is up lets the driver drain; the exit code is the driver's."""
    write_rows(tmp_path / "in" / "a.parquet", 600 if stopped else 24, row_group=6)
    data = job_data(tiny_paths["vicuna"], tmp_path / "in", tmp_path / "out")
    data["cluster"] = {"workers": 2, "shard_rows": 6}
    (tmp_path / "job.yaml").write_text(json.dumps(data))
    script = subprocess.Popen(
        [FOLDER / "slurm.sh", tmp_path / "job.yaml"],
        env=slurm,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    store, started = Store(str(tmp_path / "out")), []
    if stopped:
        until(lambda: len(list_parts(store)) >= 3, 240.0)
        started = psutil.Process(script.pid).children(recursive=True)
        script.send_signal(signal.SIGTERM)
    output, _ = script.communicate(timeout=400)
    assert script.returncode == (130 if stopped else 0), output
    until(lambda: all(map(has_ended, started)))
    verdict = verify(str(tmp_path / "out"), deep=True)
    assert all("not answered yet" in problem for problem in verdict.problems)
    assert bool(verdict.problems) == stopped

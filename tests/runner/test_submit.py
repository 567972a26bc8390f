"""Jobs on a real Ray head with token authentication: handed in, followed, measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from gc2ray.core.config.job import Job, load_job
from gc2ray.core.errors import ConfigError, GivenUp
from gc2ray.core.stats import RunStats
from gc2ray.data.store import Store
from gc2ray.demo.spec import MODEL, SMOLVLM_MODEL
from gc2ray.output.parts import list_parts, read_part_footers
from gc2ray.output.verify import verify
from gc2ray.runner import submit as submission
from gc2ray.runner.submit import JobServer
from tests.support.methods import SOURCE, install_method, write_method
from tests.support.object_servers import free_port
from tests.support.ray_head import (
    ROOT,
    ROWS,
    SECRET,
    RayHead,
    files_holding,
    gc2ray,
    output_of,
    ray_head,
    until,
    write_job,
)

EXAMPLES = ROOT / "examples"

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as head:
        yield head


@pytest.fixture
def job_file(tmp_path: Path, tiny_paths: dict[str, Path]) -> Path:
    return write_job(tmp_path, tiny_paths["vicuna"], ROWS)


@pytest.fixture
def client(head: RayHead) -> JobSubmissionClient:
    return head.client()


# --- handed in and followed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(
    head: RayHead, tmp_path_factory: pytest.TempPathFactory, tiny_paths: dict[str, Path]
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A job that was followed to its end, and what was seen of it."""
    job_file = write_job(tmp_path_factory.mktemp("first"), tiny_paths["vicuna"], ROWS)
    words = ["submit", job_file, "--address", head.address, "--follow", "--id", "first"]
    return job_file, gc2ray(head, "--log", "json", *words)


First = tuple[Path, subprocess.CompletedProcess[str]]


def test_a_job_runs_and_is_followed_to_its_end(first: First, client: JobSubmissionClient) -> None:
    job_file, result = first
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("submitted first; to see its progress: gc2ray status ")
    assert f"{ROWS} of {ROWS}" in result.stdout
    verdict = verify(output_of(job_file), deep=True)
    assert (verdict.problems, verdict.exit_code) == ((), 0)
    info = client.get_job_info("first")
    assert info.entrypoint == "python -m gc2ray --log json run job.yaml"
    assert set(info.runtime_env) <= {"working_dir", "_ray_commit"}
    assert info.metadata == {
        "run": load_job(job_file).recipe.fingerprint(),
        "output": output_of(job_file),
    }


def test_an_id_that_is_taken_is_refused(head: RayHead, first: First) -> None:
    words = ["submit", first[0], "--address", head.address, "--id", "first"]
    again = gc2ray(head, *words)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        "configuration: --id: there is a job first already; choose another, or leave it out\n"
    )


def test_no_secret_is_submitted_or_stored(
    head: RayHead, first: First, client: JobSubmissionClient
) -> None:
    """Neither what the server tells of jobs nor anything on disk holds it."""
    job_file, result = first
    reported = [json.dumps(client.list_jobs(), default=vars), result.stdout, result.stderr]
    assert not [text for text in reported if SECRET in text]
    read, holding = files_holding(SECRET, head.folder, Path(output_of(job_file)))
    assert any(path.name.startswith("runtime_env_agent") for path in read)
    assert holding == []


def test_logs_carry_run_and_shard(head: RayHead, first: First) -> None:
    """Of the workers, which Ray keeps with its own."""
    job_file, _ = first
    run, store = load_job(job_file).recipe.fingerprint(), Store(output_of(job_file))
    records = [
        json.loads(line)
        for path in head.folder.rglob("worker-*.err")
        for line in path.read_text().splitlines()
        if f'"{run}"' in line
    ]
    committed = [record for record in records if record.get("commit") == "won"]
    reported = {record["shard"]: record["message"].split(":")[0] for record in committed}
    assert reported == list_parts(store)
    assert {f"workers/{record['worker']}.json" for record in committed} <= {*store.names("workers")}


def test_a_job_ends_with_its_own_exit_code(head: RayHead, job_file: Path) -> None:
    """What is refused on the cluster is reported there, and here."""
    overrides = ["recipe.input.uri=/nowhere/rows.parquet"]
    result = gc2ray(head, "submit", job_file, *overrides, "--address", head.address, "--follow")
    assert result.returncode == 2
    refused = "configuration: recipe.input.uri: no Parquet files at /nowhere/rows.parquet\n"
    assert refused in result.stdout


def test_a_custom_method_is_uploaded_with_the_job(
    head: RayHead, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head was started without the folder that it is found in here."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))
    overrides = ["compression.method=custom_method:CenterCrop", "compression.allow_code=true"]
    words = ["submit", job_file, *(f"recipe.{override}" for override in overrides)]
    result = gc2ray(head, *words, "--address", head.address, "--follow")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = pq.read_table(Path(output_of(job_file)) / "data").to_pylist()
    assert {row["method"] for row in rows} == {"center-crop"}


# --- what is uploaded -----------------------------------------------------------------------------


class Receiving:
    """A client that keeps what is uploaded to its server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit_job(self, *, runtime_env: dict[str, str], **_: object) -> str:
        shutil.copytree(runtime_env["working_dir"], self.folder)
        return "job"


def uploaded(monkeypatch: pytest.MonkeyPatch, job: Job, folder: Path) -> Path:
    monkeypatch.setattr(submission, "_check_address", lambda _: None)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda _: Receiving(folder))
    JobServer("http://head:8265").submit(job)
    return folder


def test_weights_of_the_demo_are_not_uploaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_file: Path
) -> None:
    """Nor anything else that is large; everything but the weights is as in the package."""
    folder = uploaded(monkeypatch, load_job(job_file), tmp_path / "uploaded")
    assert {path.name for path in folder.iterdir()} == {"gc2ray", "job.yaml"}
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    assert max(path.stat().st_size for path in files.values()) < 1 << 20
    there = {
        path.relative_to(ROOT)
        for path in (ROOT / "gc2ray").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    weights = {MODEL.name, SMOLVLM_MODEL.name}
    assert {*files} == {Path("job.yaml")} | {path for path in there if not weights & {*path.parts}}


def test_a_job_runs_from_what_is_uploaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_file: Path
) -> None:
    """With a method of an installed package, which the cluster does not have."""
    site = tmp_path / "site"
    (site / "own_package").mkdir(parents=True)
    (site / "own_package" / "__init__.py").touch()
    write_method(site / "own_package", "methods")
    install_method(site, "own-entry", "own_package.methods:Own")
    with monkeypatch.context() as here:
        here.syspath_prepend(site)
        job = load_job(job_file, ["recipe.compression.method=own-entry"])
        folder = uploaded(here, job, tmp_path / "uploaded")
    done = subprocess.run(
        [sys.executable, "-m", "gc2ray", "run", "job.yaml"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(Path(job.output) / "data").to_pylist()
    assert {row["method"] for row in rows} == {"own"}


@pytest.mark.parametrize("model", [MODEL, SMOLVLM_MODEL])
def test_the_demos_models_in_the_package_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_file: Path
) -> None:
    job = load_job(job_file, [f"recipe.model.path={model}"])
    with pytest.raises(
        ConfigError, match=r"recipe\.model\.path: .* the demo's model, which is not"
    ):
        uploaded(monkeypatch, job, tmp_path / "uploaded")


def test_a_method_that_changed_is_not_uploaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job_file: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    path = write_method(tmp_path, "own_method")
    own = ["recipe.compression.method=own_method:Own", "recipe.compression.allow_code=true"]
    job = load_job(job_file, own)
    path.write_text(SOURCE + "# changed\n")
    with pytest.raises(ConfigError, match=r"recipe\.compression\.source_sha256: the source of own"):
        uploaded(monkeypatch, job, tmp_path / "uploaded")


# --- not handed in ------------------------------------------------------------------------------


def test_a_relative_path_is_refused(job_file: Path) -> None:
    result = gc2ray(None, "submit", job_file, "output=out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "output: 'out' is a path of this machine" in result.stderr


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "http://", "http://h:x"])
def test_an_invalid_address_of_a_job_server_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a job server"):
        JobServer(address)


def test_an_unreachable_head_is_reported(job_file: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    result = gc2ray(None, "submit", job_file, "--address", address)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"nobody answers at {address}" in result.stderr


def test_another_server_is_not_a_job_server(moto: tuple[str, int]) -> None:
    host, port = moto
    with pytest.raises(ConfigError, match=f":{port} refuses: Version check returned 404"):
        JobServer(f"http://{host}:{port}")


@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_missing_or_wrong_token_is_reported(
    head: RayHead, job_file: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    known = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "wrong" * 10}
    monkeypatch.setattr(RayHead, "credentials", lambda _: known)
    result = gc2ray(head, "submit", job_file, "--address", head.address)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "refuses us (401 or 403): set RAY_AUTH_MODE=token" in result.stderr


# --- followed through trouble -------------------------------------------------------------------


class Failing:
    """A client of a server that says one thing after the other of its only job."""

    def __init__(self, *answers: Exception | JobDetails) -> None:
        self.answers = list(answers)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        yield "one line\n"
        raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, _: str) -> JobDetails:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


TROUBLE = (
    RuntimeError("Request failed with status code 500: Internal Server Error"),
    ConnectionError("Failed to connect to Ray"),
    requests.ReadTimeout("slow"),
)


def following(monkeypatch: pytest.MonkeyPatch, *answers: Exception | JobDetails) -> JobServer:
    monkeypatch.setattr(submission, "_check_address", lambda _: None)
    monkeypatch.setattr(submission, "JobSubmissionClient", lambda _: Failing(*answers))
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    return JobServer("http://head:8265")


def test_errors_of_the_server_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails in every way, and then knows how the job has ended."""
    ended = JobDetails(
        type=JobType.SUBMISSION, entrypoint="", status=JobStatus.FAILED, driver_exit_code=7
    )
    seen: list[str] = []
    assert following(monkeypatch, *TROUBLE, ended).follow("job", seen.append) == 7
    assert seen == ["one line\n"]


@pytest.mark.parametrize("trouble", TROUBLE, ids=["500", "refused", "slow"])
def test_lasting_errors_of_the_server_give_up(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    """As a head does that is being killed: its job server outlives what it asks by a moment."""
    monkeypatch.setattr(submission, "LOST_SECONDS", 0.05)
    with pytest.raises(GivenUp, match="does not answer any more; `gc2ray status` tells"):
        following(monkeypatch, trouble).follow("job", lambda _: None)


def test_an_expired_token_is_reported_while_following(monkeypatch: pytest.MonkeyPatch) -> None:
    expired = AuthenticationError("Unauthenticated: Invalid token")
    with pytest.raises(ConfigError, match=r"refuses us \(401 or 403\): set RAY_AUTH_MODE=token"):
        following(monkeypatch, expired).follow("job", lambda _: None)


# --- measured -----------------------------------------------------------------------------------

DRIVER = """
import itertools, sys, time
from functools import partial
from pathlib import Path
from gc2ray.core.config.job import Job, load_job
from gc2ray.runner.run import run_job
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine

def gated(gate, taken, request):
    if next(taken) == 24:  # the last one, of whichever shard was taken up last
        while not gate.exists():
            time.sleep(0.05)

def load(gate, job):
    return EchoEngine(0.002, partial(gated, gate, itertools.count(1)))

def worker(job, kept_columns, gate):
    return Worker(job, kept_columns, load=partial(load, gate))

job_file, address, gate = sys.argv[1:4]
job = load_job(Path(job_file))
run_job(job, address=address, make_worker=partial(worker, gate=Path(gate)))
"""


def scraped(head: RayHead, run: str) -> dict[tuple[str, str], float]:
    """The run's counters, summed over workers: by name and the label that is its own."""
    text = requests.get(head.metrics_address, timeout=10).text
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("run") == run and sample.name.startswith("ray_gc2ray_"):
                name = sample.name.removeprefix("ray_gc2ray_").removesuffix("_total")
                own = [
                    sample.labels[key]
                    for key in ("status", "fate", "stage")
                    if key in sample.labels
                ]
                key = (name, *own, "")[:2]
                found[key] = found.get(key, 0.0) + sample.value
    return found


def footer_facts(store: Store) -> dict[tuple[str, str], float]:
    """The same from the footers of the committed parts."""
    names = sorted(list_parts(store).values())
    stats = sum((footer.stats for footer in read_part_footers(store, names)), RunStats())
    kept = stats.visual_tokens_kept
    reported = {
        ("shards", ""): len(names),
        ("output_tokens", ""): stats.output_tokens,
        ("input_starved_seconds", ""): stats.input_starved_ns / 1e9,
        ("visual_tokens", "kept"): kept,
        ("visual_tokens", "saved"): stats.visual_tokens_full - kept,
        **{("answers", status): rows for status, rows in stats.by_status.items()},
        **{("stage_seconds", stage): ns / 1e9 for stage, ns in stats.stage_ns.items()},
    }
    return {key: value for key, value in reported.items() if value}


def test_metrics_agree_with_the_footers(head: RayHead, job_file: Path, tmp_path: Path) -> None:
    """Three shards are committed, the fourth waits at its last row while we look."""
    gate, run = tmp_path / "gate", load_job(job_file).recipe.fingerprint()
    store = Store(output_of(job_file))
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(job_file), head.gcs_address, str(gate)],
        env={**os.environ, **head.credentials(), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: len(list_parts(store)) == 3)
        reported = footer_facts(store)
        until(lambda: scraped(head, run) == pytest.approx(reported), 30.0)
        assert reported["answers", "ok"] == 18
    finally:
        gate.touch()
        _, stderr = driver.communicate(timeout=400)
        sys.stderr.write(stderr)  # for whoever reads why this failed
    assert driver.returncode == 0

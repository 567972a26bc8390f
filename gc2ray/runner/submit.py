"""`JobServer`: runs a job on a Ray cluster from outside, through the cluster's job server.

What travels is this package, the job file and the compression method that the job names, if it is
not one of gc2ray's, as Ray's working directory. The weights of the demo's model do not, and no
environment variable does, because Ray stores those in clear and shows them to everybody who may
list jobs. Nodes get their credentials from their own storage: role, profile, mounted file.

The libraries that gc2ray depends on are expected in the cluster's image.

Not covered: making a cluster.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.job import Job
from gc2ray.core.config.method_source import ENTRY_POINTS, is_dotted
from gc2ray.core.errors import ConfigError, GivenUp, first_line
from gc2ray.runner.ray_session import check_port

ENTRYPOINT = ("python", "-m", "gc2ray")
JOB_FILE = "job.yaml"
POLL_SECONDS = 1.0
LOST_SECONDS = 60.0
"""Time that a job server may be silent before following a job is given up."""
PACKAGE = Path(__file__).parents[1]
_DEMO_MODELS = (Path("demo", "model"), Path("demo", "model_smolvlm"))
_METADATA = "Metadata-Version: 2.1\nName: gc2ray-job-method\nVersion: 0\n"
_DEFAULT_PORTS = {"http": 80, "https": 443}

log = logging.getLogger(__name__)

Write = Callable[[str], object]


class JobServer:
    """The job server of one cluster.

    Args:
        address: URL of the server, as `http://head:8265`.

    Raises:
        ConfigError: The address is malformed, no server answers, or it rejects the credentials.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        _check_address(address)
        with self._explained():
            self._client = JobSubmissionClient(address)
        for handler in logging.getLogger("ray").handlers:  # Ray would log each of its requests
            handler.setLevel(logging.WARNING)

    def submit(
        self, job: Job, command: Sequence[str] = ("run",), submission_id: str | None = None
    ) -> str:
        """Hand in a job, which starts at once; returns its id.

        Args:
            job: The job; its paths mean the same on the cluster as here.
            command: The command of gc2ray to which the job file is given.
            submission_id: An id that is unique on the cluster; None: the server draws one.

        Raises:
            ConfigError: A path is relative, the model is the demo's in this package, the source of
                the compression method has changed, the id is taken, or the server refuses.
        """
        job.check_portable()
        _check_model_travels(job)
        if submission_id is not None and self._is_taken(submission_id):
            raise ConfigError(
                f"--id: there is a job {submission_id} already; choose another, or leave it out"
            )
        entrypoint = shlex.join([*ENTRYPOINT, *command, JOB_FILE])
        with _packed(job) as folder, self._explained():
            return str(
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=submission_id,
                    runtime_env={"working_dir": str(folder)},
                    metadata={"run": job.recipe.fingerprint(), "output": job.output},
                )
            )

    def follow(self, submission_id: str, write: Write) -> int:
        """Pass on what a job prints until it ends; returns its exit code.

        A connection that breaks is not the job's end: its state is asked for until it is known.

        Raises:
            GivenUp: The server is gone, or the job ended without an exit code.
            ConfigError: The server refuses us.
        """
        with self._explained():
            asyncio.run(self._pass_on(submission_id, write))
            details = self._ended(submission_id)
        if details.status is JobStatus.STOPPED:
            raise GivenUp(f"{submission_id} was stopped; submit it again to resume")
        if details.driver_exit_code is None:
            said = " ".join(str(details.message).split())
            raise GivenUp(f"{submission_id} ended without an exit code: {said}")
        return int(details.driver_exit_code)

    async def _pass_on(self, submission_id: str, write: Write) -> None:
        try:
            async for piece in self._client.tail_job_logs(submission_id):
                write(piece)
        except (aiohttp.ClientError, RuntimeError) as error:
            log.warning("what %s prints cannot be followed: %s", submission_id, error)

    def _ended(self, submission_id: str) -> JobDetails:
        """What is known of a job when it has ended.

        A failing server may recover; without its head node it reports no job.
        """
        heard = time.monotonic()
        while True:
            try:
                details = self._client.get_job_info(submission_id)
            except (ConnectionError, requests.RequestException, RuntimeError) as error:
                if time.monotonic() - heard > LOST_SECONDS:
                    raise GivenUp(
                        f"{self.address} does not answer any more; `gc2ray status` tells from the "
                        "output how far the job is"
                    ) from error
            else:
                heard = time.monotonic()
                if details.status.is_terminal():
                    return details
            time.sleep(POLL_SECONDS)

    def _is_taken(self, submission_id: str) -> bool:
        with self._explained():
            return any(job.submission_id == submission_id for job in self._client.list_jobs())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong between us and the server, in a line that says what to do.

        Raises:
            ConfigError: In place of whatever Ray raises.
        """
        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(
                f"{self.address} refuses us (401 or 403): set RAY_AUTH_MODE=token, and the "
                "cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
            ) from error
        except (ConnectionError, requests.RequestException) as error:
            raise ConfigError(
                f"{self.address} does not answer as a job server: {first_line(error)[:300]}"
            ) from error
        except RuntimeError as error:
            raise ConfigError(f"{self.address} refuses: {first_line(error)[:300]}") from error


def _check_address(address: str) -> None:
    """Find out within seconds what Ray would wait for.

    Raises:
        ConfigError: No address of a job server, or nobody is there.
    """
    try:
        parts = urlsplit(address)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(
            f"--address: {address} is not the address of a job server (expected http://HOST:8265)"
        )
    try:
        check_port(parts.hostname, port)
    except OSError as error:
        raise ConfigError(
            f"--address: nobody answers at {address} ({error}); is the cluster up, with its "
            "dashboard, and can this machine reach it?"
        ) from error


def _check_model_travels(job: Job) -> None:
    """Refuse the demo's models where they lie in this package, because they are not uploaded.

    Raises:
        ConfigError: One is the job's model.
    """
    path, left_out = Path(job.recipe.model.path), [PACKAGE / model for model in _DEMO_MODELS]
    if path.is_absolute() and path.resolve() in [model.resolve() for model in left_out]:
        raise ConfigError(
            f"recipe.model.path: {path} is the demo's model, which is not uploaded; copy that "
            "directory to a place that all nodes of the cluster read, and name it"
        )


@contextmanager
def _packed(job: Job) -> Iterator[Path]:
    """A directory with everything that is uploaded, for as long as that takes."""
    with tempfile.TemporaryDirectory(prefix="gc2ray-job-") as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=_left_out)
        _pack_method(job.recipe.compression, folder)
        (folder / JOB_FILE).write_text(job.to_yaml(), encoding="utf-8")
        yield folder


def _left_out(folder: str, names: Sequence[str]) -> set[str]:
    """Names of a folder of this package that are not uploaded."""
    models = [PACKAGE / model for model in _DEMO_MODELS]
    return {name for name in names if name == "__pycache__" or Path(folder, name) in models}


def _pack_method(compression: CompressionConfig, folder: Path) -> None:
    """Add the module of a method that gc2ray does not bring, with its entry point if it has one.

    Raises:
        ConfigError: Its source is gone, or is not that of the recipe.
    """
    source = compression.source()
    if source is None or source.root == PACKAGE:
        return
    root = source.root
    if root.is_dir():
        shutil.copytree(root, folder / root.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(root, folder)
    if not is_dotted(compression.method):
        about = folder / "gc2ray_job_method-0.dist-info"  # as of an installed package
        about.mkdir()
        name, value = compression.method, f"{source.module}:{source.class_name}"
        (about / "METADATA").write_text(_METADATA, encoding="utf-8")
        (about / "entry_points.txt").write_text(
            f"[{ENTRY_POINTS}]\n{name} = {value}\n", encoding="utf-8"
        )

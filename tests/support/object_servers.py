"""Two real S3 servers on loopback: one that honours conditional writes, one that ignores them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

KEY = "test"
SECRET = "hunter2hunter2hunter2"
START_SECONDS = 20.0


@contextmanager
def moto_server() -> Iterator[tuple[str, int]]:
    """Host and port of a server that honours conditions; what it holds is in its memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


class RcloneServer:
    """A server that ignores conditions; what it holds are files, so it may be killed and restarted.

    Args:
        folder: Holds the buckets.
    """

    def __init__(self, folder: Path) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Until it listens."""
        options = {
            "--addr": f"{self.host}:{self.port}",
            "--auth-key": f"{KEY},{SECRET}",
            "--config": os.devnull,
        }
        command = [rclone_program(), "serve", "s3", str(self.folder)]
        self._process = subprocess.Popen(
            command + [word for option in options.items() for word in option],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.host, self.port)

    def kill(self) -> int:
        """Its pid, once it is gone; nothing is told to it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        assert self._process.wait() == -signal.SIGKILL
        return self._process.pid

    @contextmanager
    def running(self) -> Iterator[RcloneServer]:
        self.start()
        try:
            yield self
        finally:
            self.kill()


@contextmanager
def aws_environment(host: str, port: int) -> Iterator[None]:
    """Address and keys in the environment, as in real life."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Not every server knows the checksums that newer clients add.
        patch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def single_try_clients() -> Iterator[None]:
    """The client's own tries, which may take half a minute, are left to whoever calls it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def quick_clients() -> Iterator[None]:
    """The client's own tries are made as ever, but follow each other almost at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("botocore.retryhandler.delay_exponential", lambda **_: 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def a_bucket(host: str, port: int) -> Iterator[str]:
    """A new bucket of a server, and the environment to use it."""
    with aws_environment(host, port):
        bucket = f"bucket-{uuid.uuid4().hex}"
        s3fs.S3FileSystem().mkdir(bucket)
        yield f"s3://{bucket}"


def rclone_program() -> str:
    """Where it is: installed beside Python."""
    found = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert found, "rclone is not installed"
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(host: str, port: int, seconds: float = START_SECONDS) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), 1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return

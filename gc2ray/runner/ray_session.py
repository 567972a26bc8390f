"""Joining a Ray cluster, or starting a local one; and what the cluster offers to a worker.

Ray waits for minutes where nothing listens at an address, so that the port is tried first.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError, GivenUp

CONNECT_SECONDS = 10.0
OBJECT_STORE_BYTES = 200 * 1024 * 1024
"""Shards and answers travel as files; the object store carries a few small messages."""
MAX_MESSAGE = 500
"""Characters of Ray's own error messages that are passed on."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Join the cluster at an address or at `RAY_ADDRESS`; without either, start a local Ray.

    If this process has already joined a Ray, that one is used and left running.

    Raises:
        ConfigError: There is no cluster at the address, or none can be started here.
        GivenUp: The cluster fails later on.
    """
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            _join(address or os.environ.get("RAY_ADDRESS") or None)
        yield
    except RayError as error:
        raise GivenUp(
            f"Ray failed: {type(error).__name__}: {first_lines(error)}; run the same command again "
            "to resume"
        ) from error
    finally:
        if is_ours:
            ray.shutdown()


def gpus_per_worker(cluster: Cluster) -> float:
    """As configured; otherwise 1 if the cluster has GPUs, else 0."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def check_port(host: str, port: int) -> None:
    """Open and close a connection.

    Raises:
        OSError: Nothing listens there.
    """
    socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()


def first_lines(error: Exception) -> str:
    """The first two lines of Ray's message, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] if lines else type(error).__name__


def _join(address: str | None) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            _check_address(address)
        ray.init(**options, logging_level=logging.ERROR)
    except SystemExit as ended:  # by Ray's own handler of SIGTERM, which it puts in place of ours
        raise KeyboardInterrupt from ended
    except Exception as error:  # Ray raises bare ones, too
        raise ConfigError(_join_failure(address, error)) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _check_address(address: str) -> None:
    """Try the port of an address, if it has one.

    Raises:
        OSError: Nothing listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        check_port(host, int(port))


def _join_failure(address: str | None, error: Exception) -> str:
    """Why Ray is not available, and what to do about it."""
    reason = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if "AF_UNIX" in reason:
        advice = (
            f"its sockets are below TMPDIR, {folder} ({len(folder)} characters): set TMPDIR, or "
            "RAY_TMPDIR, to a shorter path, of 40 characters at most"
        )
    elif "ersion mismatch" in reason:
        advice = (
            "install the cluster's versions here, or run `gc2ray submit`, which uses the cluster's"
        )
    elif address is None:
        advice = (
            "Ray keeps a token in the home directory: if that is not writable, set "
            f"RAY_AUTH_MODE=disabled, or HOME; Ray's logs are below {folder}/ray"
        )
    else:
        advice = (
            "if the cluster requires a token, set RAY_AUTH_MODE=token; to run on this machine, "
            "leave out --address and RAY_ADDRESS"
        )
    action = f"join a Ray cluster at {address}" if address else "start Ray on this machine"
    return f"cannot {action}: {reason}; {advice}"

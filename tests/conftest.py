"""Tiny models, made once a session, and rows to answer with them.

torch is imported by fixtures: the process that only hands out tests to others starts without it.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

import gc
import logging
import random
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import pytest

from gc2ray.data.store import Store
from tests.support.chaos import Survived
from tests.support.fault_proxy import FaultProxy, Faults
from tests.support.object_servers import RcloneServer, a_bucket, moto_server, quick_clients

if TYPE_CHECKING:
    from gc2ray.models.adapter import LoadedModel

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a job in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start is to hear it


def is_stray(item: pytest.Item) -> bool:
    return item.get_closest_marker("alone") is not None and item.path.parent.name != "faults"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray, or are slow, first: nothing should be left to wait for one of them."""
    strays = [item.nodeid for item in items if is_stray(item)]
    if strays:
        raise pytest.UsageError(f"make looks for tests that run alone in tests/faults: {strays}")
    marks = ("ray", "slow")
    longest = {item.path for item in items if any(map(item.get_closest_marker, marks))}
    items.sort(key=lambda item: item.path not in longest)


def pytest_collection_finish() -> None:
    """Libraries stay; going through their hundred thousands of objects took a fifth of the time.

    Whoever collects garbage by hand, to free a large model, collects the young here: models are
    tiny, and the old come to their turn.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    collect = gc.collect
    gc.collect = lambda generation=2: collect(min(generation, 1))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tiny models: a second thread only waits for the first


@pytest.fixture(autouse=True)
def _levels_as_before() -> Iterator[None]:
    """What a command makes louder or quieter for its process is not for the tests behind it."""
    loggers = [
        known
        for known in logging.root.manager.loggerDict.values()
        if isinstance(known, logging.Logger)
    ]
    levels = [(logger, logger.level) for logger in (logging.root, *loggers)]
    yield
    for logger, level in levels:
        if logger.level != level:
            logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from gc2ray.models.families.tiny import build_tiny
    from tests.support.tiny_models import SPECS

    root = tmp_path_factory.mktemp("models")
    return {name: build_tiny(root / name, spec) for name, spec in SPECS.items()}


@pytest.fixture(scope="session")
def loaded_models(tiny_paths: dict[str, Path]) -> dict[str, LoadedModel]:
    from gc2ray.models import loading

    return {
        name: loading.load(str(path), revision=None, dtype="float32", device="cpu")
        for name, path in tiny_paths.items()
    }


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[str, int]]:
    """Host and port of an S3 server that honours conditional writes."""
    with moto_server() as address:
        yield address


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Host and port of one that ignores them."""
    with RcloneServer(tmp_path_factory.mktemp("buckets")).running() as server:
        yield server.host, server.port


@pytest.fixture
def s3(moto: tuple[str, int]) -> Iterator[str]:
    """An empty bucket where conditional writes are honoured."""
    with a_bucket(*moto) as bucket:
        yield bucket


@pytest.fixture
def rclone(rclone_server: tuple[str, int]) -> Iterator[str]:
    """An empty bucket where they are not."""
    with a_bucket(*rclone_server) as bucket:
        yield bucket


@pytest.fixture(scope="session")
def proxies(
    moto: tuple[str, int], rclone_server: tuple[str, int]
) -> Iterator[dict[str, FaultProxy]]:
    """In front of a server that honours conditional writes, and of one that ignores them."""
    honours, ignores = FaultProxy(*moto), FaultProxy(*rclone_server)
    with honours.running(), ignores.running():
        yield {"honours": honours, "ignores": ignores}


@pytest.fixture
def server() -> str:
    """Which of them; some tests ask for the other one, too."""
    return "honours"


@pytest.fixture
def proxy(proxies: dict[str, FaultProxy], server: str) -> FaultProxy:
    proxies[server].faults = Faults()
    proxies[server].met.clear()
    return proxies[server]


@pytest.fixture
def quick() -> Iterator[None]:
    """Clients of object stores that wait almost nothing between their own tries."""
    with quick_clients():
        yield


SURVIVED = pytest.StashKey[Survived]()
SOAKED = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="kills of each kind, a multiple of 3")
    parser.addoption("--rows", type=int, default=3000, help="rows of the soak")
    parser.addoption("--seconds", type=float, default=12.0, help="that the soak takes at least")


@pytest.fixture
def survived(request: pytest.FixtureRequest) -> Survived:
    """What the tests under fire lived through, told at the end."""
    return request.config.stash.setdefault(SURVIVED, Survived())


@pytest.fixture
def soaked(request: pytest.FixtureRequest) -> dict[str, object]:
    """What became of a soak, told at the end."""
    return request.config.stash.setdefault(SOAKED, {})


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    survived = config.stash.get(SURVIVED, None)
    if survived is not None and survived.losses:
        terminalreporter.section("faults survived")
        for line in survived.table():
            terminalreporter.write_line(line)
    soaked = config.stash.get(SOAKED, {})
    if soaked:
        terminalreporter.section("soak")
        for name, value in soaked.items():
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@pytest.fixture(params=["local", "memory", "s3", "rclone"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param in ("s3", "rclone"):
        yield Store(f"{request.getfixturevalue(request.param)}/run")
    elif request.param == "memory":
        yield Store(f"memory://run-{uuid.uuid4().hex}")
        fsspec.filesystem("memory").store.clear()
    else:
        yield Store(str(tmp_path / "run"))


@pytest.fixture(params=["local", "s3"])
def racy(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on which several writers may meet."""
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3')}/run")
    return Store(str(tmp_path / "run"))

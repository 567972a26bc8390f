"""A node's cache of models: one process fetches, the others wait; room is checked first."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from gc2ray.core.config.recipe import ModelConfig
from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint import cache as cache_module
from gc2ray.models.checkpoint.fetch import fetch_model
from tests.support.fetching import WANTED, fetch, files_in

SPAWN = multiprocessing.get_context("spawn")  # a fork would share open files, and torch's threads


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def _fetch_and_log(url: str, log: Path, hang_at: str | None = None) -> None:
    """In a process of its own: every file that is fetched leaves a line in the log."""
    copy_file = LocalFileSystem.get_file

    def get_file(self: Any, path: str, target: str, **options: Any) -> None:
        with log.open("a") as lines:
            lines.write(f"{Path(path).name}\n")
        if Path(path).name == hang_at:
            time.sleep(3600)
        time.sleep(0.2)
        copy_file(self, path, target, **options)

    LocalFileSystem.get_file = get_file
    print(fetch(url).directory, file=log.with_suffix(f".{os.getpid()}").open("w"))


def start(url: str, log: Path, hang_at: str | None = None) -> Any:
    process = SPAWN.Process(target=_fetch_and_log, args=(url, log, hang_at))
    process.start()
    return process


def test_one_of_four_processes_fetches(source: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [start(source.as_uri(), log) for _ in range(4)]
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(Path(name).name for name in WANTED)
    used = {log.with_suffix(f".{p.pid}").read_text().strip() for p in processes}
    assert used == {str(path) for path in cache.iterdir() if path.suffix != ".lock"}
    assert len(used) == 1


def test_a_fetch_that_was_killed_is_repeated(source: Path, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(source.as_uri(), log, hang_at="model.safetensors")
    wait_until(lambda: log.exists() and len(log.read_text().split()) == len(WANTED))
    wait_until(lambda: bool(list(cache.glob("*.partial/config.json"))))
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    (leftover,) = cache.glob("*.partial")
    (leftover / "more.json").touch()
    directory = fetch(source.as_uri()).directory
    assert files_in(directory) == WANTED
    assert not leftover.exists()


def test_a_full_disk_is_reported_before_anything_is_fetched(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 17_000))
    with pytest.raises(OSError, match=r"needs 0\.000 GB") as caught:
        fetch(source.as_uri())
    assert str(cache) in str(caught.value)
    assert "set GC2RAY_CACHE to a larger disk" in str(caught.value)
    assert [path.suffix for path in cache.iterdir()] in ([], [".lock"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 18_000))
    fetch(source.as_uri())


def test_a_cache_that_cannot_be_written_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GC2RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory.*GC2RAY_CACHE"):
        fetch(source.as_uri())


def test_fetching_starts_after_a_random_delay(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    own, sleep = threading.get_ident(), time.sleep

    def note(seconds: float) -> None:  # other tests' workers may sleep on threads of theirs
        if threading.get_ident() == own:
            slept.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", note)
    for _ in range(8):
        fetch_model(ModelConfig(path=source.as_uri()), jitter_seconds=5.0)
    assert len(slept) == len(set(slept)) == 8
    assert all(0 <= seconds <= 5 for seconds in slept)


def test_waiting_ticks_while_the_other_process_fetches(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "POLL_SECONDS", 0.05)
    directory = fetch(source.as_uri()).directory
    partial = directory.with_suffix(".partial")
    directory.rename(partial)
    ticks: list[int] = []
    with FileLock(directory.with_suffix(".lock")):
        waiter = threading.Thread(
            target=lambda: fetch(source.as_uri(), tick=lambda: ticks.append(1))
        )
        waiter.start()
        wait_until(lambda: len(ticks) == 1)  # what was there already
        time.sleep(0.5)
        assert len(ticks) == 1, "nothing moved meanwhile"
        (partial / "more.safetensors").write_bytes(b"x" * 100_000)
        wait_until(lambda: len(ticks) == 2)
        (partial / "more.safetensors").unlink()
        partial.rename(directory)
    waiter.join(60)
    assert files_in(directory) == WANTED

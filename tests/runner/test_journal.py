"""What a worker has in hand, and had when it was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gc2ray.core.config.job import Job
from gc2ray.core.errors import (
    EngineDead,
    StorageRefused,
)
from gc2ray.runner.journal import STALE_SECONDS, Journal, read_and_remove
from gc2ray.runner.messages import ShardAssignment
from tests.support.fakes import EchoEngine
from tests.support.workers import make_worker, second_try, shards_of

CHILD = """
import os, signal, sys
from pathlib import Path
from gc2ray.runner.journal import Journal
journal = Journal(Path(sys.argv[1]))
with journal.page("aaaa", 100) as first, journal.page("bbbb", 5) as second:
    for row in (3, 99, 7, 7, 50):
        first.begin(row)
    for row in (50, 7):
        first.end(row)
    second.begin(4)
    print(journal.prefix, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_journal_outlives_a_killed_process(tmp_path: Path) -> None:
    """Row 7 has two prompts, of which one is answered: it is still in hand."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    prefix = Path(child.stdout.strip())
    assert read_and_remove(prefix) == {"aaaa": (3, 7, 99), "bbbb": (4,)}
    assert list(tmp_path.iterdir()) == []
    assert read_and_remove(prefix) == {}


def test_a_shard_that_was_not_begun_has_nothing_in_hand(tmp_path: Path) -> None:
    """One that was, and has nothing in hand, may have ended its worker all the same."""
    journal = Journal(tmp_path)

    def die() -> None:
        with journal.page("aaaa", 3), journal.page("bbbb", 3) as begun:
            begun.open()
            raise EngineDead("the device is lost")

    with pytest.raises(EngineDead):
        die()
    journal.prefix.with_suffix(".cccc").touch()  # killed before it was written
    assert read_and_remove(journal.prefix) == {"aaaa": (), "cccc": ()}


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    """In a process that may write files of 100 bytes, as on a disk that is full."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from gc2ray.runner.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try:\n"
        "    with Journal(Path(sys.argv[1])).page('aaaa', 1000) as page: page.begin(999)\n"
        "except OSError as error: print('error:', error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout[:13]) == (0, "error: [Errno"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_space_of_a_page_is_reserved_before_anything_is_noted(tmp_path: Path) -> None:
    """Or a row that is noted on a full disk would be a signal, SIGBUS."""
    journal = Journal(tmp_path)
    with journal.page("aaaa", 100_000):
        page = journal.prefix.with_suffix(".aaaa").stat()
        assert page.st_blocks * 512 >= page.st_size == 400_004


def test_a_page_may_be_removed_by_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with journal.page("aaaa", 3):
        journal.prefix.with_suffix(".aaaa").unlink()


def test_a_page_ends_with_its_shard(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with journal.page("aaaa", 3) as page:
        page.begin(2)
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), journal.page("aaaa", 0):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_page_stays_when_the_engine_dies(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def die() -> None:
        with journal.page("aaaa", 3) as page:
            page.begin(1)
            raise EngineDead("the device is lost")

    with pytest.raises(EngineDead):
        die()
    assert read_and_remove(journal.prefix) == {"aaaa": (1,)}


def test_journals_do_not_mix(tmp_path: Path) -> None:
    one, two = Journal(tmp_path), Journal(tmp_path)
    with one.page("aaaa", 3) as first, two.page("aaaa", 3) as second:
        first.begin(1)
        second.begin(2)
        assert read_and_remove(two.prefix) == {"aaaa": (2,)}
        (tmp_path / f"{two.prefix.name}.aaaa").touch()  # its owner removes it, too


def test_stale_journals_are_deleted(tmp_path: Path) -> None:
    old, new, foreign = (Journal(tmp_path).prefix.with_suffix(".aaaa") for _ in range(3))
    foreign = tmp_path / "something-else"
    for path in (old, new, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (0, time.time() - STALE_SECONDS - 1))
    Journal(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([new, foreign])


def test_the_journal_names_what_is_in_hand(job: Job, tmp_path: Path) -> None:
    """While the engine is stuck with row 4; rows that are answered are out of hand."""
    stuck, go_on = threading.Event(), threading.Event()

    def on_row(request):
        if request.row == 4:
            stuck.set()
            go_on.wait(60)

    worker = make_worker(job, EchoEngine(on_row=on_row))
    shard = shards_of(job, rows=12)[0]
    with ThreadPoolExecutor(1) as caller:
        call = caller.submit(worker.process, ShardAssignment(shard))
        assert stuck.wait(60)
        (page,) = worker.journal.parent.glob(f"{worker.journal.name}.*")
        counters = np.fromfile(page, np.uint32)
        go_on.set()
        call.result(timeout=60)
    assert page.suffix == f".{shard.sid}"
    assert counters[4] == 1
    assert not counters[:4].any()
    assert not page.exists()


def test_rows_with_a_fault_are_not_in_hand(multi_prompt_job: Job) -> None:
    """Nothing is tried with them, so they are not suspected."""
    seen: list[int] = []

    class Looking(EchoEngine):
        def stream(self, requests):
            for answer in super().stream(requests):
                page = next(worker.journal.parent.glob(f"{worker.journal.name}.*"))
                seen.extend(np.flatnonzero(np.fromfile(page, np.uint32)).tolist())
                yield answer

    worker = make_worker(multi_prompt_job, Looking(buffered=100))
    worker.process(ShardAssignment(shards_of(multi_prompt_job, rows=12)[0]))
    assert 4 in seen
    assert not {3, 10} & {*seen}, "their lists are null"


def test_an_engine_that_dies_with_suspects_fails_every_caller(job: Job) -> None:
    def on_row(request):
        if request.row == 4:
            raise RuntimeError("the engine breaks")

    worker = make_worker(job, EchoEngine(on_row=on_row))
    shard = shards_of(job, rows=12)[0]
    with pytest.raises(EngineDead):
        worker.process(second_try(shard, suspects=(2, 4, 6)))
    assert read_and_remove(worker.journal) == {shard.sid: (4,)}


def test_a_journal_that_cannot_be_written_is_reported_with_its_folder(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk for temporary files: the next shard would not fare better."""
    worker = make_worker(job)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(worker._journal, "page", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(StorageRefused, match=r"its journal in /\S+: OSError: .*No space left"):
        worker.process(ShardAssignment(shards_of(job)[0]))


def test_a_shard_that_waits_is_not_begun(job: Job) -> None:
    """Behind one whose last row is not read yet."""
    reading, go_on = threading.Event(), threading.Event()

    class Slow(EchoEngine):
        def stream(self, requests):
            def held():
                for number, request in enumerate(requests):
                    if number == 3:
                        reading.set()
                        go_on.wait(60)
                    yield request

            yield from super().stream(held())

    worker, (first, second, *_) = make_worker(job, Slow(buffered=100)), shards_of(job)
    with ThreadPoolExecutor(2) as callers:
        calls = [callers.submit(worker.process, ShardAssignment(first))]
        assert reading.wait(60)
        calls.append(callers.submit(worker.process, ShardAssignment(second)))
        while worker._shards._queue.qsize() < 1:
            time.sleep(0.01)
        pages = worker.journal.parent.glob(f"{worker.journal.name}.*")
        counters = {page.suffix[1:]: np.fromfile(page, np.uint32) for page in pages}
        go_on.set()
        for call in calls:
            call.result(timeout=60)
    assert counters[first.sid][-1] == 1
    assert counters[first.sid].sum() > 1
    assert not counters[second.sid].any()

"""`Worker`: the only owner of an engine; answers shards and commits their parts.

A plain class: no Ray in it, so that tests build it directly. One thread runs the engine on one
endless stream of requests, so that a shard's border never drains it; callers of `process` (two at a
time, as a rule) wait for their shard, write its part and commit it while the engine goes on.

Which rows the engine has in hand stands in a journal that outlives the process. Rows that an
earlier try died with come first, few at a time; those that are known to kill are not tried.

A shard that cannot be read fails alone, and so does one whose part is at fault (`UnwritableShard`).
A storage that refuses whatever is written refuses the next shard, too (`StorageRefused`). When the
engine itself fails every waiting shard gets `EngineDead`, and the process is to be ended by its
owner.

Not covered: rows that kill the process while they are read from their file: they take their shard.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import pyarrow as pa

from gc2ray.core.config.job import Job
from gc2ray.core.errors import (
    STORAGE_ERRORS,
    ConfigError,
    EngineDead,
    ShardError,
    StorageRefused,
    UnwritableShard,
    first_line,
)
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import Shard, Span
from gc2ray.core.stats import RunStats
from gc2ray.data.dataset import Source
from gc2ray.data.retries import is_transient
from gc2ray.data.store import Store
from gc2ray.engine.audit import Answering, Audited
from gc2ray.output.parts import Commit, PartFooter, commit_part, in_order, part_bytes
from gc2ray.output.run_directory import MODEL_NAME, stored_digest
from gc2ray.runner.journal import Journal, Page
from gc2ray.runner.messages import Progress, ShardAssignment, ShardResult

RECORD_SECONDS = 30.0
_TOO_LARGE = {errno.EFBIG, errno.EMSGSIZE}
"""What a storage says of a single object; smaller ones it takes."""

log = logging.getLogger(__name__)


StepHook = Callable[[str, str], None]
"""Called with a step of a shard (`read`, `answered`, `written`, `committed`) and its sid."""


@dataclass(eq=False)
class _Work:
    """A shard on its way through the engine.

    Attributes:
        expected: Keys of the requests that were read.
        answers: Those that are answered, by key.
    """

    handout: ShardAssignment
    page: Page
    expected: set[str] = field(default_factory=set)
    answers: dict[str, Answer] = field(default_factory=dict)
    all_read: bool = False
    done: Future[None] = field(default_factory=Future)

    @property
    def sid(self) -> str:
        return self.handout.shard.sid

    @property
    def is_idle(self) -> bool:
        """Nothing of it is in hand, or nobody waits for it any more."""
        return len(self.answers) == len(self.expected) or self.done.done()

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Worker:
    """Answers shards of one job.

    Args:
        job: The job.
        carried: Schema of the input columns that are written back.
        retry_round: 0, or that of the retry whose rows these are.
        load: Makes the engine; the default loads the recipe's model.
        metrics: Told every step of a shard.

    Attributes:
        uuid: Of this process, as the records of its answers name it.
        run: Fingerprint of the recipe.
    """

    def __init__(
        self,
        job: Job,
        carried: pa.Schema,
        *,
        retry_round: int = 0,
        load: Callable[[Job], Answering] | None = None,
        metrics: StepHook | None = None,
    ) -> None:
        self.uuid = uuid.uuid4().hex
        self.run = job.recipe.fingerprint()
        self._job = job
        self._carried = carried
        self._retry_round = retry_round
        self._load = load or self._load_engine
        self._metrics = metrics or (lambda step, sid: log.debug("%s %s", step, sid))
        self._store = Store(job.output)
        self._source = Source(job.recipe.input)
        self._journal = Journal()
        self._queue: queue.Queue[_Work] = queue.Queue()
        self._reading: list[_Work] = []
        self._in_hand: dict[str, tuple[_Work, int | None]] = {}  # by row key; the row's counter
        self._shards = threading.Condition()  # of all these: one thread reads, another answers
        self._dead: EngineDead | None = None
        self._counted = RunStats()
        self._engine: Answering | None = None
        self._progress = Progress()
        self._ticks = 0
        self._running = threading.Lock()
        self._started = datetime.now(UTC)
        self._loaded: datetime | None = None

    @property
    def journal(self) -> Path:
        """Prefix of the journal's files, for whoever buries this process."""
        return self._journal.prefix

    def load(self) -> str:
        """Load the engine, start its thread and the worker's record; returns the device's name.

        Raises:
            ConfigError: The model cannot be loaded, or is another one than the run began with.
            OSError: It could not be fetched now, or the storage does not answer.
            StorageRefused: The output takes nothing.
        """
        self._engine = self._load(self._job)
        with self._writing(MODEL_NAME):
            self._check_model(self._engine.model_digest)
        self._loaded = datetime.now(UTC)
        threading.Thread(target=self._keep_record, daemon=True, name="gc2ray-record").start()
        return self._engine.device

    def calibrate(self, spans: Sequence[Span]) -> float:
        """Seconds per row over sample rows, their answers thrown away; before any `process`.

        As many prompts as the sample has rows are answered, so that lists of prompts make it no
        longer, and the prompts of all its rows are counted. They are answered twice, to warm up and
        to be timed, and timed as a whole: answers come in bursts, so the time between two of them
        means nothing.
        """
        rows = sum(span.rows for span in spans)
        prompts = 0

        def first() -> Iterator[Request]:
            nonlocal prompts
            for request in self._rows(spans):
                prompts += 1
                if prompts <= rows:
                    yield request

        self._answer(first())
        self._loaded_engine().clear_cache()
        started = time.monotonic()
        self._answer(islice(self._rows(spans), rows))
        seconds = time.monotonic() - started
        self._loaded_engine().clear_cache()  # or the first shards would find their images encoded
        return seconds / max(1, rows) * prompts / max(1, rows)

    def process(self, handout: ShardAssignment) -> ShardResult:
        """Answer a shard and commit its part; may be called by several threads.

        Raises:
            ShardError: The shard cannot be read as planned, or its part could not be written now.
            UnwritableShard: Its part can never be written.
            StorageRefused: No part can be.
            EngineDead: The engine is lost; end this process.
        """
        if self._running.acquire(blocking=False):  # once: it is never released
            threading.Thread(target=self._stream, daemon=True, name="gc2ray-engine").start()
        shard = handout.shard
        with self._page(shard) as page:
            work = _Work(handout, page)
            self._queue.put(work)
            work.done.result()
        return self._commit(work)

    @contextlib.contextmanager
    def _page(self, shard: Shard) -> Iterator[Page]:
        """The shard's page of the journal.

        Raises:
            StorageRefused: There is no room for it, and would be none for the next shard's.
        """
        with contextlib.ExitStack() as stack:
            try:
                page = stack.enter_context(self._journal.page(shard.sid, shard.rows))
            except OSError as error:
                told = f"{type(error).__name__}: {first_line(error)}"
                raise StorageRefused(
                    f"the worker on {socket.gethostname()} cannot note rows in "
                    f"{self.journal.parent}: {told}; make room there, or set TMPDIR where Ray's "
                    "nodes are started"
                ) from error
            yield page

    def progress(self) -> Progress:
        """What was done so far; cheap, and callable at any time."""
        return replace(self._progress, ticks=peak_host_bytes() + _bytes_moved() + self._ticks)

    def _answer(self, requests: Iterator[Request]) -> None:
        """Answer requests for nothing but the time it takes."""
        for _ in self._loaded_engine().stream(requests):
            self._tick()

    def _check_model(self, digest: str) -> None:
        """All workers of a run, and those that go on with it, must have the same model.

        The first one says which.

        Raises:
            ConfigError: This is another one.
        """
        model = self._job.recipe.model
        told = {"digest": digest, "path": model.path, "revision": model.revision}
        data = (json.dumps(told, indent=2) + "\n").encode()
        if self._store.create(MODEL_NAME, data):
            return
        first = stored_digest(self._store)
        if first != digest:
            raise ConfigError(
                f"recipe.model: {model.path} is another model than the run began with ({digest} "
                f"here, {first} in {MODEL_NAME}); pin recipe.model.revision, or choose a new output"
            )

    def _tick(self) -> None:
        """Something got on that neither answers nor bytes of this process tell of."""
        with self._shards:
            self._ticks += 1

    def _load_engine(self, job: Job) -> Answering:
        # Imported here because only a worker that answers needs the model's libraries; the driver
        # and the command line, which know workers too, start seconds sooner without them.
        from gc2ray.engine.engine import load_engine

        engine = load_engine(job.recipe, job.cluster, self._tick)
        audit = job.recipe.audit
        if not audit.share:
            return engine
        return Audited(engine, audit.share, tuple(job.recipe.rungs()), audit.min_agreement)

    def _loaded_engine(self) -> Answering:
        if self._engine is None:
            raise EngineDead("the worker has no engine yet: call load first")
        return self._engine

    def _stream(self) -> None:
        """The engine's thread: one stream for the life of the worker."""
        reason = "the engine stopped"
        try:
            for answer in self._loaded_engine().stream(self._requests()):
                self._take(answer)
        except Exception as error:  # the thread's end: whoever waits for a shard is told
            log.exception("the engine died")
            reason = f"{type(error).__name__}: {error}"
        self._die(EngineDead(reason))

    def _die(self, error: EngineDead) -> None:
        """Tell every shard, now and from here on, that there is no engine."""
        with self._shards:
            self._dead = error
            for work in self._reading:
                work.fail(error)
            self._shards.notify_all()
        while True:
            self._queue.get().fail(error)

    def _requests(self) -> Iterator[Request]:
        """Requests of shard after shard; read on a thread of the engine's."""
        while True:
            work = self._queue.get()
            with self._shards:
                if self._dead is not None:
                    work.fail(self._dead)
                    return
                work.page.open()
                self._reading.append(work)
            yield from self._shard_requests(work)

    def _shard_requests(self, work: _Work) -> Iterator[Request]:
        try:
            groups = list(work.handout.suspect_groups())
            yield from self._suspects(work, groups)
            alone = {row for group in groups for row in group}
            for row, request in self._numbered(work.handout):
                if row not in alone:
                    begun = self._begin(work, row, request)
                    if begun is None:
                        return
                    yield begun
        except ShardError as error:
            with self._shards:
                self._fail(work, error)
            log.warning("%s", error, extra={"shard": work.sid})
            return
        self._metrics("read", work.sid)
        with self._shards:
            work.all_read = True
            self._close_if_whole(work)

    def _suspects(self, work: _Work, groups: Sequence[Sequence[int]]) -> Iterator[Request]:
        """Rows that an earlier try died with: a group when the one before it is answered."""
        group_of = {row: number for number, group in enumerate(groups) for row in group}
        current = 0
        for row, request in self._numbered(work.handout) if group_of else ():
            number = group_of.get(row, current)
            if number != current:
                self._wait_until_idle(work)
                current = number
            begun = self._begin(work, row, request) if row in group_of else None
            if begun is not None:
                yield begun
        self._wait_until_idle(work)

    def _wait_until_idle(self, work: _Work) -> None:
        with self._shards:
            self._shards.wait_for(lambda: work.is_idle)

    def _begin(self, work: _Work, row: int, request: Request) -> Request | None:
        """Note that a request goes to the engine; None if its shard has failed meanwhile.

        Those that are known to have no answer are not suspected of anything.
        """
        poison = work.handout.fault(row)
        if poison is not None:
            request = replace(request, images=(), prompts=(), fault=poison)
        key = request.row_key
        with self._shards:
            if work.done.done():
                return None
            if key in work.expected:
                raise ShardError(f"{key} was read twice")
            work.expected.add(key)
            if request.fault is None:
                work.page.begin(row)
            self._in_hand[key] = (work, row if request.fault is None else None)
        return request

    def _numbered(self, handout: ShardAssignment) -> Iterator[tuple[int, Request]]:
        """The requests of a shard, with the place of each one's row in it."""
        before = 0
        for span in handout.shard.spans:
            for request in self._rows([span]):
                if not span.first <= request.row < span.stop:
                    raise ShardError(f"{request.row_key} was read, but is not planned")
                yield before + request.row - span.first, request
            before += span.rows

    def _rows(self, spans: Sequence[Span]) -> Iterator[Request]:
        for span in spans:
            yield from self._source.read(span, self._job.cluster.host_memory_bytes)

    def _take(self, answer: Answer) -> None:
        """Put an answer where it belongs; those of a shard that failed belong nowhere."""
        key = answer.request.row_key
        self._progress += Progress.from_answer(answer)  # by the engine's thread alone
        with self._shards:
            work, row = self._in_hand.pop(key, (None, None))
            if work is None or work.done.done():
                return
            if row is not None:
                work.page.end(row)
            if answer.retry:
                self._fail(work, ShardError(f"{key}: {answer.error}"))
                return
            work.answers[key] = answer
            if work.is_idle:
                self._close_if_whole(work)
                self._shards.notify_all()

    def _fail(self, work: _Work, error: ShardError) -> None:
        if work in self._reading:
            self._reading.remove(work)
        work.fail(error)
        self._shards.notify_all()

    def _close_if_whole(self, work: _Work) -> None:
        if work in self._reading and work.all_read and work.is_idle:
            self._reading.remove(work)
            self._metrics("answered", work.sid)
            work.done.set_result(None)

    def _commit(self, work: _Work) -> ShardResult:
        """Every planned row, each of its prompts once, in order; then the part, whole or not."""
        shard = work.handout.shard
        answers = in_order(shard, work.answers.values())
        footer = PartFooter(
            sid=shard.sid,
            run=self.run,
            token=uuid.uuid4().hex,
            worker=self.uuid,
            rows=shard.rows,
            stats=self._part_stats(answers),
            written=datetime.now(UTC),
        )
        provenance = Provenance(work.handout.attempt, self._retry_round, self.uuid)
        part = self._part(answers, provenance, footer)
        self._metrics("written", shard.sid)
        commit = self._committed(shard, part, footer.token)
        self._metrics("committed", shard.sid)
        told = {"shard": shard.sid, "attempt": work.handout.attempt, "commit": str(commit)}
        log.info("%s: %d rows", shard.part_name, shard.rows, extra=told)
        return ShardResult(shard.sid, footer.stats, commit)

    def _part(self, answers: Sequence[Answer], provenance: Provenance, footer: PartFooter) -> bytes:
        try:
            return part_bytes(answers, self._carried, provenance, footer)
        except (pa.ArrowException, OverflowError) as error:
            told = f"{type(error).__name__}: {error}"
            raise UnwritableShard(f"its answers do not fit into Parquet: {told}") from error

    def _committed(self, shard: Shard, part: bytes, token: str) -> Commit:
        try:
            with self._writing(shard.part_name):
                return commit_part(self._store, shard, part, token)
        except ConfigError as error:  # something else has the part's name
            raise UnwritableShard(str(error)) from error
        except STORAGE_ERRORS as error:
            told = f"the part cannot be written: {error}"
            if getattr(error, "errno", None) in _TOO_LARGE:
                raise UnwritableShard(f"{told} ({len(part):,} bytes)") from error
            raise ShardError(told) from error

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """What the output's storage refuses for good, whatever is written.

        Raises:
            StorageRefused: In place of that.
        """
        try:
            yield
        except STORAGE_ERRORS as error:
            if is_transient(error) or getattr(error, "errno", None) in _TOO_LARGE:
                raise
            raise StorageRefused(
                f"{self._store.uri} refused {name} to the worker on {socket.gethostname()}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    def _part_stats(self, answers: Sequence[Answer]) -> RunStats:
        """The rows', and what came up since the part before that belongs to no row."""
        totals = self._loaded_engine().totals()
        with self._shards:
            new, self._counted = totals.since(self._counted), totals
        own = replace(new, peak_host_bytes=peak_host_bytes())
        return stats_of(answers) + own

    def _keep_record(self) -> None:
        """Rewrite `workers/<uuid>.json`: what this process costs, while it lives."""
        while True:
            # A record that cannot be written now is written 30 s later; answers do not wait for it.
            with contextlib.suppress(*STORAGE_ERRORS):
                self._store.replace(f"workers/{self.uuid}.json", self._record())
            time.sleep(RECORD_SECONDS)

    def _record(self) -> bytes:
        shape = self._loaded_engine().model_shape
        content = {
            "uuid": self.uuid,
            "node": socket.gethostname(),
            "pid": os.getpid(),
            "device": self._loaded_engine().device,
            "model_digest": self._loaded_engine().model_digest,
            "model_shape": shape and shape.to_dict(),
            "gpus": self._job.cluster.gpus_per_worker,
            "cpus": self._job.cluster.cpus_per_worker,
            "started": self._started.isoformat(),
            "loaded": self._loaded.isoformat() if self._loaded else None,
            "last_seen": datetime.now(UTC).isoformat(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def peak_host_bytes() -> int:
    """Largest resident set of this process so far; 0 where there is no /proc to tell.

    Not `ru_maxrss`: that is inherited from the parent over fork and exec.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _bytes_moved() -> int:
    """Bytes that this process moved from and to disks; grows while weights are read or fetched."""
    path = Path("/proc/self/io")
    if not path.exists():
        return 0
    counters = dict(line.split(": ") for line in path.read_text(encoding="utf-8").splitlines())
    return int(counters["read_bytes"]) + int(counters["write_bytes"])

"""`Worker`: owns one engine, answers shards with it and commits their parts.

A plain class without Ray, so that tests build it directly. One thread runs the engine on one
endless stream of requests (`gc2ray.runner.shard_work`), so that the accelerator never idles between
two shards. Callers of `process` (two at a time, as a rule) wait for their shard, write its part and
commit it while the engine works on the next shard.

A journal that outlives the process holds the rows that the engine has in hand.

A shard that cannot be read fails alone, and so does a shard whose part cannot be written
(`UnwritableShard`). A storage that refuses this write would refuse the next shard's as well
(`StorageRefused`). When the engine itself fails, every waiting shard gets `EngineDead`, and the
owner of the process is to end it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path

import psutil
import pyarrow as pa

from gc2ray.core.config.job import Job
from gc2ray.core.errors import (
    ConfigError,
    EngineDead,
    ShardError,
    StorageRefused,
    UnwritableShard,
    first_line,
    storage_errors,
)
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import Shard, Span
from gc2ray.core.stats import RunStats
from gc2ray.data.retries import is_transient
from gc2ray.data.source import Source
from gc2ray.data.store import Store, json_bytes
from gc2ray.engine.answering import AnsweringEngine
from gc2ray.engine.audit import AuditedEngine
from gc2ray.engine.device import peak_host_bytes
from gc2ray.output.heartbeats import Heartbeat, WorkerRecord
from gc2ray.output.parts import Commit, PartFooter, commit_part, in_order, part_bytes
from gc2ray.output.run_directory import MODEL_NAME, stored_digest
from gc2ray.runner.journal import Journal, Page
from gc2ray.runner.messages import Progress, ShardAssignment, ShardResult
from gc2ray.runner.shard_work import ShardStream, ShardWork, StepHook

RECORD_SECONDS = 30.0
"""Between two writes of the worker's record."""
_TOO_LARGE = {errno.EFBIG, errno.EMSGSIZE}
"""Errors of a storage that refuses one object for its size, and would take a smaller one."""

log = logging.getLogger(__name__)


class Worker:
    """Answers shards of one job.

    Args:
        job: The job.
        kept_columns: Schema of the input columns that are written back.
        retry_round: The number of the retry round, 0 for the first run.
        load: Makes the engine; the default loads the recipe's model.
        on_step: Called after every step of a shard, for tests.

    Attributes:
        uuid: Identifies this process; its answers carry it.
        run: Fingerprint of the recipe.
    """

    def __init__(
        self,
        job: Job,
        kept_columns: pa.Schema,
        *,
        retry_round: int = 0,
        load: Callable[[Job], AnsweringEngine] | None = None,
        on_step: StepHook | None = None,
    ) -> None:
        self.uuid = uuid.uuid4().hex
        self.run = job.recipe.fingerprint()
        self._job = job
        self._kept_columns = kept_columns
        self._retry_round = retry_round
        self._load = load or self._load_engine
        self._on_step = on_step or (lambda step, sid: log.debug("%s %s", step, sid))
        self._store = Store(job.output)
        self._source = Source(job.recipe.input)
        self._journal = Journal()
        self._shards = ShardStream(self._read, self._on_step)
        self._lock = threading.Lock()  # guards the totals and ticks
        self._counted = RunStats()  # the engine's totals that footers have
        self._engine: AnsweringEngine | None = None
        self._progress = Progress()
        self._ticks = 0
        self._running = threading.Lock()
        self._started = datetime.now(UTC)
        self._loaded: datetime | None = None

    @property
    def journal(self) -> Path:
        """Prefix of the journal's files, which are read when this process has ended."""
        return self._journal.prefix

    def load(self) -> str:
        """Load the engine and start the worker's record; returns the device's name.

        Raises:
            ConfigError: The model cannot be loaded, or differs from the one the run began with.
            OSError: The model could not be fetched now, or the storage does not answer.
            StorageRefused: The output's storage refuses writes.
        """
        self._engine = self._load(self._job)
        with self._writing(MODEL_NAME):
            self._check_model(self._engine.model_digest)
        self._loaded = datetime.now(UTC)
        Heartbeat(self._store, self._record, RECORD_SECONDS, logging.DEBUG).start()
        return self._engine.device

    def calibrate(self, spans: Sequence[Span]) -> float:
        """Measure seconds per row on sample rows and discard their answers; before any `process`.

        As many prompts are answered as the sample has rows, so that lists of prompts do not make
        calibration longer; the result is scaled by the prompts per row. The prompts are answered
        twice, first to warm up and then to be timed as a whole: answers come in bursts, so that the
        time between two of them means nothing.
        """
        rows = sum(span.rows for span in spans)
        prompts = 0

        def first() -> Iterator[Request]:
            nonlocal prompts
            for request in self._read_all(spans):
                prompts += 1
                if prompts <= rows:
                    yield request

        self._answer(first())
        self._loaded_engine().clear_cache()
        started = time.monotonic()
        self._answer(islice(self._read_all(spans), rows))
        seconds = time.monotonic() - started
        self._loaded_engine().clear_cache()  # or the first shards' images would be encoded already
        return seconds / max(1, rows) * prompts / max(1, rows)

    def process(self, assignment: ShardAssignment) -> ShardResult:
        """Answer a shard and commit its part; may be called by several threads.

        Raises:
            ShardError: The shard cannot be read as planned, or its part could not be written now.
            UnwritableShard: Its part can never be written.
            StorageRefused: No part can be written.
            EngineDead: The engine has failed; end this process.
        """
        if self._running.acquire(blocking=False):  # once: it is never released
            threading.Thread(target=self._run_engine, daemon=True, name="gc2ray-engine").start()
        with self._page(assignment.shard) as page:
            work = self._shards.submit(assignment, page)
            work.done.result()
        return self._commit(work)

    @contextlib.contextmanager
    def _page(self, shard: Shard) -> Iterator[Page]:
        """The shard's page of the journal.

        Raises:
            StorageRefused: There is no room for it, nor for the next shard's.
        """
        with contextlib.ExitStack() as stack:
            try:
                page = stack.enter_context(self._journal.page(shard.sid, shard.rows))
            except OSError as error:
                raise StorageRefused(
                    f"the worker on {socket.gethostname()} cannot write its journal in "
                    f"{self.journal.parent}: {type(error).__name__}: {first_line(error)}; free "
                    "space there, or set TMPDIR where Ray's nodes are started"
                ) from error
            yield page

    def progress(self) -> Progress:
        """What was done so far; cheap, and callable from any thread."""
        return replace(self._progress, ticks=peak_host_bytes() + _bytes_moved() + self._ticks)

    def _answer(self, requests: Iterator[Request]) -> None:
        """Answer requests and discard the answers."""
        for _ in self._loaded_engine().stream(requests):
            self._tick()

    def _check_model(self, digest: str) -> None:
        """Check that every worker of a run has the same model; the first worker records it.

        Raises:
            ConfigError: The model differs from the recorded one.
        """
        model = self._job.recipe.model
        content = {"digest": digest, "path": model.path, "revision": model.revision}
        if self._store.create(MODEL_NAME, json_bytes(content)):
            return
        first = stored_digest(self._store)
        if first != digest:
            raise ConfigError(
                f"recipe.model: {model.path} differs from the model that the run began with "
                f"({digest} here, {first} in {MODEL_NAME}); pin recipe.model.revision, or choose a "
                "new output"
            )

    def _tick(self) -> None:
        """Count progress that shows neither in answers nor in this process's bytes."""
        with self._lock:
            self._ticks += 1

    def _load_engine(self, job: Job) -> AnsweringEngine:
        # Imported here because only a worker that answers needs the model's libraries; the driver
        # and the command line, which know workers too, start seconds sooner without them.
        from gc2ray.engine.engine import load_engine

        job.recipe.compression.source()  # of this node; refused before the model is fetched
        engine = load_engine(job.recipe, job.cluster, self._tick)
        audit = job.recipe.audit
        if not audit.share:
            return engine
        return AuditedEngine(
            engine, audit.share, tuple(job.recipe.escalation_steps()), audit.min_similarity
        )

    def _loaded_engine(self) -> AnsweringEngine:
        if self._engine is None:
            raise EngineDead("the worker has no engine yet: call load first")
        return self._engine

    def _run_engine(self) -> None:
        """The engine's thread: one stream for the life of the worker."""
        reason = "the engine stopped"
        try:
            for answer in self._loaded_engine().stream(self._shards.requests()):
                self._progress += Progress.from_answer(answer)  # on this thread only
                self._shards.accept(answer)
        except Exception as error:  # the thread ends: every waiting shard gets the error
            log.exception("the engine died")
            reason = f"{type(error).__name__}: {error}"
        self._shards.close(EngineDead(reason))

    def _read(self, span: Span) -> Iterator[Request]:
        return self._source.read(span, self._job.cluster.host_memory_bytes)

    def _read_all(self, spans: Sequence[Span]) -> Iterator[Request]:
        return chain.from_iterable(map(self._read, spans))

    def _commit(self, work: ShardWork) -> ShardResult:
        """Check that every prompt of every planned row has one answer, and commit the part."""
        shard = work.assignment.shard
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
        provenance = Provenance(work.assignment.attempt, self._retry_round, self.uuid)
        part = self._part(answers, provenance, footer)
        self._on_step("written", shard.sid)
        commit = self._committed(shard, part, footer.token)
        self._on_step("committed", shard.sid)
        fields = {"shard": shard.sid, "attempt": work.assignment.attempt, "commit": str(commit)}
        log.info("%s: %d rows", shard.part_name, shard.rows, extra=fields)
        return ShardResult(shard.sid, footer.stats, commit)

    def _part(self, answers: Sequence[Answer], provenance: Provenance, footer: PartFooter) -> bytes:
        try:
            return part_bytes(answers, self._kept_columns, provenance, footer)
        except (pa.ArrowException, OverflowError) as error:
            raise UnwritableShard(
                f"its answers do not fit into Parquet: {type(error).__name__}: {error}"
            ) from error

    def _committed(self, shard: Shard, part: bytes, token: str) -> Commit:
        try:
            with self._writing(shard.part_name):
                return commit_part(self._store, shard, part, token)
        except ConfigError as error:  # something else has the part's name
            raise UnwritableShard(str(error)) from error
        except storage_errors() as error:
            message = f"the part cannot be written: {error}"
            if getattr(error, "errno", None) in _TOO_LARGE:
                raise UnwritableShard(f"{message} ({len(part):,} bytes)") from error
            raise ShardError(message) from error

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """While an object is written to the output: tell a refusal from a passing failure.

        Raises:
            StorageRefused: The storage refuses writes for good, whatever is written.
        """
        try:
            yield
        except storage_errors() as error:
            if is_transient(error) or getattr(error, "errno", None) in _TOO_LARGE:
                raise
            raise StorageRefused(
                f"{self._store.uri} refused {name} from the worker on {socket.gethostname()}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error

    def _part_stats(self, answers: Sequence[Answer]) -> RunStats:
        """Statistics of the answers, and of the engine since the part before this one."""
        totals = self._loaded_engine().totals()
        with self._lock:
            new, self._counted = totals.since(self._counted), totals
        own = replace(new, peak_host_bytes=peak_host_bytes())
        return stats_of(answers) + own

    def _record(self, *, has_ended: bool) -> WorkerRecord:  # noqa: ARG002 - it never writes a last one
        engine, cluster = self._loaded_engine(), self._job.cluster
        shape = engine.model_shape
        return WorkerRecord(
            uuid=self.uuid,
            node=socket.gethostname(),
            pid=os.getpid(),
            device=engine.device,
            model_digest=engine.model_digest,
            model_shape=None if shape is None else shape.to_dict(),
            gpus=cluster.gpus_per_worker,
            cpus=cluster.cpus_per_worker,
            started=self._started,
            loaded=self._loaded,
            last_seen=datetime.now(UTC),
        )


def _bytes_moved() -> int:
    """Bytes that this process read and wrote on disks; grows while weights are read or fetched."""
    process = psutil.Process()
    if not hasattr(process, "io_counters"):  # macOS
        return 0
    counters = process.io_counters()
    return counters.read_bytes + counters.write_bytes

"""`run_job`: runs a job to its end, from wherever an earlier run left it.

A run has three steps: open the output and find what an earlier run left there, freeze the plan, and
answer. Everything that can be refused is refused before Ray is joined. While shards are answered,
the first signal to stop lets those in flight end, and the second ends the run at once. The outcome
is judged by everything in the output, however little this run added, so that a rerun has the same
outcome.

Not covered: what a person sees of it (`gc2ray.reporting.terminal`).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pyarrow as pa

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import ConfigError
from gc2ray.core.process import STOP_SIGNALS, heard
from gc2ray.core.shards import Shard, SourceFile, first_spans
from gc2ray.data.source import Source
from gc2ray.data.store import AT_START, Store
from gc2ray.models.checkpoint.fetch import check_model
from gc2ray.output.heartbeats import driver_heartbeat, warn_of_others
from gc2ray.output.kept_columns import as_written
from gc2ray.output.plan import PLAN_NAME, Plan
from gc2ray.output.planner import (
    CALIBRATION_ROWS,
    Committed,
    Judged,
    Outcome,
    committed_parts,
    extend_plan,
    outcome,
    shard_rows,
    store_plan,
    stored_plan,
)
from gc2ray.output.retry import FAILURES, Retried, Retry, latest_failures, next_retry
from gc2ray.output.run_directory import RETRY_ROUNDS, object_name, retry_numbers
from gc2ray.runner import ray_session
from gc2ray.runner.driver import Driver
from gc2ray.runner.messages import Display
from gc2ray.runner.ray_pool import MakeWorker, RayPool
from gc2ray.runner.worker import Worker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Output:
    """A job's output as an earlier run left it.

    Attributes:
        job: The job.
        store: The output's store.
        source: The job's input.
        plan: The frozen plan; None for a new output.
        committed: The committed parts of the plan; None for a new output.
    """

    job: Job
    store: Store
    source: Source
    plan: Plan | None
    committed: Committed | None


def run_job(
    job: Job,
    *,
    address: str | None = None,
    display: Display | None = None,
    make_worker: MakeWorker = Worker,
    extend: bool = False,
    warn_of_new_files: bool = True,
) -> Outcome:
    """Run a job to its end, from wherever an earlier run left it.

    Args:
        job: The job.
        address: Address of a Ray cluster; None means `RAY_ADDRESS`, or else a local Ray.
        display: Called with the state about once a second.
        make_worker: Makes the workers.
        extend: Add input files that are new since the run began to the plan.
        warn_of_new_files: Log how many such files there are, where they are not added.

    Raises:
        ConfigError: The configuration cannot be used, or the output belongs to another one.
        GivenUp: The run stopped before its end.
        Interrupted: A signal stopped it.
    """
    output = _open_output(job.located(), extend=extend, warn_of_new_files=warn_of_new_files)
    if output.plan is not None and output.committed is not None and output.committed.whole:
        return _final_outcome(output, output.plan, output.committed)
    files, kept_columns = _check_before_answering(output)
    with (
        ray_session.connected(address),
        _workers(output.job, kept_columns, make_worker) as pool,
        stopping() as stop,
    ):
        driver = Driver(pool.cluster, output.store, pool, display or (lambda _: None), stop)
        with driver_heartbeat(output.store, driver.usage):
            plan = output.plan or _freeze_plan(output, files, kept_columns, driver)
            # Another driver may have been faster, and have committed parts of a new plan.
            committed = output.committed or committed_parts(output.store, plan)
            driver.run(plan, committed)
    if driver.lost_races:
        log.warning(
            "%d parts had been committed already: is another driver at work?", driver.lost_races
        )
    output.store.sweep()
    newest = stored_plan(output.store, output.job) or plan  # another driver may have extended it
    is_same = len(newest.shards) == len(plan.shards)
    committed = committed_parts(output.store, newest, committed if is_same else None)
    return _final_outcome(output, newest, committed)


def run_retry(
    retry: Retry,
    cluster: Cluster,
    *,
    address: str | None = None,
    display: Display | None = None,
    make_worker: MakeWorker = Worker,
) -> Retried:
    """Answer the rows of a retry again, as a run of its own; no earlier answer is changed.

    Args:
        retry: The rows to answer; its plan is frozen first.
        cluster: Workers and limits of the run.
        address: Address of a Ray cluster, as in `run_job`.
        display: Display of the run's state, as in `run_job`.
        make_worker: Makes a worker, as in `run_job`; called with `retry_round` as well.

    Returns:
        Whether too many answers failed is judged once, at the end, by the latest answers of the
        whole output: the rows of a retry have failed before.

    Raises:
        ConfigError, GivenUp, Interrupted: As `run_job`.
    """
    job = retry.job(cluster.model_copy(update={"max_bad_rows": 1.0}))
    _check_recipe(job.recipe)  # a retry that is refused is not begun
    retry.freeze()
    result = run_job(
        job,
        address=address,
        display=display,
        make_worker=partial(make_worker, retry_round=retry.number),
        warn_of_new_files=False,
    )
    judged = Judged(*latest_failures(retry.output), cluster.max_bad_rows)
    return Retried(retry.number, replace(result, judged=judged), judged)


def retry_output(
    output: str,
    cluster: Cluster,
    failures: Collection[str] = (),
    address: str | None = None,
    display: Display | None = None,
) -> Retried:
    """Answer the rows of an output that failed again, if there are any.

    Args:
        output: Directory or URL of a run.
        cluster: Workers and limits.
        failures: Which rows: statuses of answers, or `DEAD`; none: all that failed.
        address: Address of a Ray cluster, as in `run_job`.
        display: Display of the run's state, as in `run_job`.

    Raises:
        ConfigError, GivenUp, Interrupted: As `run_job`.
    """
    retry = next_retry(output, failures or FAILURES)
    if retry is None:
        return Retried(None, None, Judged(*latest_failures(output), cluster.max_bad_rows))
    return run_retry(retry, cluster, address=address, display=display)


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that the first signal to stop sets; the second signal raises.

    Only the main thread receives signals.

    Raises:
        KeyboardInterrupt: At the second signal.
    """
    stop = threading.Event()

    def handle(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in filter(heard, STOP_SIGNALS)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_output(job: Job, *, extend: bool, warn_of_new_files: bool) -> _Output:
    """Read the plan and the commits of an earlier run, and extend the plan if that is wanted.

    Raises:
        ConfigError: The output cannot be used, is damaged, or belongs to another configuration.
    """
    store = Store(job.output)
    store.check_usable(writing=False)
    source = Source(job.recipe.input)
    plan = stored_plan(store, job)
    if plan is None or extend:
        _check_apart(source, job.output)
    if plan is None:
        return _Output(job, store, source, None, None)
    if extend:
        files, schema = source.scan()
        files = source.apart(files, {planned for planned, _ in plan.shards.files})
        plan = extend_plan(store, job, plan, files, as_written(schema))
    elif warn_of_new_files:
        _warn_of_new_files(job, plan)
    return _Output(job, store, source, plan, committed_parts(store, plan))


def _check_before_answering(output: _Output) -> tuple[Sequence[SourceFile], pa.Schema]:
    """Refuse what can be refused before Ray is joined.

    Returns:
        The input files, if there is no plan yet, and the schema of the kept columns.

    Raises:
        ConfigError: The method, the model, the output or the input cannot be used.
    """
    _check_recipe(output.job.recipe)
    output.store.check_usable(writing=True)
    warn_of_others(output.store)
    if output.plan is not None:
        return [], output.plan.kept_columns
    files, schema = output.source.scan()
    return files, as_written(schema)


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a custom method that is missing or changed, and a model that cannot be used.

    Raises:
        ConfigError: The message names the setting.
    """
    recipe.compression.check_source()
    check_model(recipe.model, recipe.taken_over())


@contextmanager
def _workers(job: Job, kept_columns: pa.Schema, make_worker: MakeWorker) -> Iterator[RayPool]:
    """A pool of workers in the Ray that was joined; they end with the context."""
    # Workers record what they cost, so that their job has the share of a GPU that they really get.
    share = {"gpus_per_worker": ray_session.gpus_per_worker(job.cluster)}
    job = job.model_copy(update={"cluster": job.cluster.model_copy(update=share)})
    pool = RayPool(job.cluster, make_worker, (job, kept_columns))
    try:
        yield pool
    finally:
        pool.close()


def _freeze_plan(
    output: _Output, files: Sequence[SourceFile], kept_columns: pa.Schema, driver: Driver
) -> Plan:
    """Cut the input into shards and store the plan.

    The number of rows of a shard is the configured one, or follows from a measurement on the first
    rows.
    """
    cluster = output.job.cluster
    rows, seconds = sum(file.rows for file in files), 0.0
    if cluster.shard_rows is None and rows > 0:
        seconds = driver.calibrate(first_spans(files, CALIBRATION_ROWS))
    size = shard_rows(cluster, rows, driver.most_workers, seconds)
    plan = Plan.cut(output.job.recipe, files, size, kept_columns)
    return store_plan(output.store, output.job, plan)


def _final_outcome(output: _Output, plan: Plan, committed: Committed) -> Outcome:
    """The outcome, judged by how many answers failed; where retries ran, by the latest answers."""
    result = outcome(output.store, plan, committed)
    counts = result.stats.rows, result.stats.bad_rows
    if retry_numbers(Store(output.job.output).names(RETRY_ROUNDS)):
        try:
            counts = latest_failures(output.job.output)
        except ConfigError as error:  # the outcome of the run is reported all the same
            log.warning("the outcome does not count the output's retries: %s", error)
    return replace(result, judged=Judged(*counts, output.job.cluster.max_bad_rows))


def _check_apart(source: Source, output: str) -> None:
    """Refuse an output whose files would be read as input.

    Raises:
        ConfigError: They would be.
    """
    own = (PLAN_NAME, Shard(0, "0" * 16, ()).part_name)
    if source.would_take(output, [object_name(number, name) for number in (0, 1) for name in own]):
        raise ConfigError(
            f"output: {output} lies where recipe.input.uri would take its files for input; choose "
            "a place outside, or one whose name begins with _"
        )


def _warn_of_new_files(job: Job, plan: Plan) -> None:
    """Log how many input files are not planned; the run does not depend on it."""
    try:
        new = Source(job.recipe.input, AT_START).unplanned(
            {source for source, _ in plan.shards.files}
        )
    except ConfigError as error:
        log.warning("cannot tell whether there are new input files: %s", error)
        return
    if new:
        log.warning(
            "%d input files are new since the run began (%s); add them with --extend",
            len(new),
            new[0],
        )

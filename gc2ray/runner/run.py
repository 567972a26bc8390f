"""`run_job`: one run of a job, from wherever an earlier one left it to its end.

Everything that can be refused is refused before Ray is joined. Signals are minded while shards are
out: the first lets them end, the second does not wait. However little a run did, its end is judged
by all that is in its output: a rerun says the same.

Not covered: what a person sees of it (`gc2ray.report.terminal`).
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.errors import ConfigError
from gc2ray.core.process import STOP_SIGNALS, heard
from gc2ray.core.shards import Shard, SourceFile, first_spans
from gc2ray.data.dataset import Source
from gc2ray.data.store import AT_START, Store
from gc2ray.models.checkpoint.fetch import check_model
from gc2ray.output.heartbeats import Heartbeat, warn_of_others
from gc2ray.output.kept_columns import as_written
from gc2ray.output.plan import PLAN_NAME, Plan
from gc2ray.output.planner import (
    CALIBRATION_ROWS,
    Judged,
    Outcome,
    committed_parts,
    extend_plan,
    outcome,
    shard_rows,
    store_plan,
    stored_plan,
)
from gc2ray.output.retry import Retry, freeze, latest_failures
from gc2ray.output.run_directory import RETRY_ROUNDS, object_name, retry_numbers
from gc2ray.runner import ray_session
from gc2ray.runner.driver import Driver
from gc2ray.runner.messages import Display
from gc2ray.runner.ray_pool import RayPool
from gc2ray.runner.worker import Worker

log = logging.getLogger(__name__)


def run_job(
    job: Job,
    *,
    address: str | None = None,
    display: Display | None = None,
    make_worker: Callable[..., Worker] = Worker,
    extend: bool = False,
    tell_new: bool = True,
) -> Outcome:
    """Run a job to its end, from wherever an earlier run left it.

    Args:
        job: What, how and where.
        address: Of a Ray cluster; None: `RAY_ADDRESS`, or a local Ray.
        display: Shown the state about once a second.
        make_worker: Makes the workers, in their processes, from the job and the carried schema.
        extend: Plan input files that are new since the run began, too.
        tell_new: Say whether there are any, if they are not planned.

    Raises:
        ConfigError: The configuration cannot be used, or the output belongs to another one.
        GivenUp: The run stopped before its end.
        Interrupted: A signal stopped it.
    """
    job = job.located()
    store = Store(job.output)
    store.check_usable(writing=False)
    source = Source(job.recipe.input)
    plan = stored_plan(store, job)
    if plan is None or extend:
        _check_apart(source, job.output)
    if plan is not None and extend:
        files, found = source.scan()
        files = source.apart(files, {planned for planned, _ in plan.shards.files})
        plan = extend_plan(store, job, plan, files, as_written(found))
    elif plan is not None and tell_new:
        _tell_new(job, plan)
    committed = committed_parts(store, plan) if plan else None
    if plan is not None and committed is not None and committed.whole:
        return _judged(outcome(store, plan, committed), job)
    check_model(job.recipe.model, job.recipe.generation.taken_over())
    store.check_usable(writing=True)
    warn_of_others(store)
    files, found = ([], plan.carried) if plan else source.scan()
    carried = plan.carried if plan else as_written(found)
    with ray_session.connected(address):
        # Workers write down what they cost, so they are told the share that they really get.
        share = {"gpus_per_worker": ray_session.gpus_per_worker(job.cluster)}
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update=share)})
        pool = RayPool(job.cluster, make_worker, (job, carried))
        try:
            with stopping() as stop:
                driver = Driver(job.cluster, store, pool, display or (lambda _: None), stop)
                with Heartbeat(store, driver.usage):
                    if plan is None:
                        rows = _shard_rows(job, files, driver)
                        plan = store_plan(store, job, Plan.cut(job.recipe, files, rows, carried))
                    if committed is None:  # another driver may have been faster
                        committed = committed_parts(store, plan)
                    driver.run(plan, committed)
        finally:
            pool.close()
    if driver.lost_races:
        log.warning("%d parts were there already: is another driver at work?", driver.lost_races)
    store.sweep()
    now = stored_plan(store, job) or plan  # somebody may have extended it meanwhile
    known = committed if len(now.shards) == len(plan.shards) else None
    return _judged(outcome(store, now, committed_parts(store, now, known)), job)


def run_retry(
    retry: Retry,
    cluster: Cluster,
    *,
    address: str | None = None,
    display: Display | None = None,
    make_worker: Callable[..., Worker] = Worker,
) -> Outcome:
    """Answer anew what a retry names, as a run of its own; nothing else is touched.

    Args:
        retry: What to answer; its plan is frozen first.
        cluster: How.
        address: As for `run_job`; and so the others.
        display: As there.
        make_worker: Is told the `retry_round`, too.

    Returns:
        How it ended. Whether too many answers failed is judged by the latest answers of the whole
        output, and only at the end: what is retried has failed before.

    Raises:
        ConfigError, GivenUp, Interrupted: As `run_job`.
    """
    freeze(retry)
    own = run_job(
        retry.job(cluster.model_copy(update={"max_bad_rows": 1.0})),
        address=address,
        display=display,
        make_worker=partial(make_worker, retry_round=retry.number),
        tell_new=False,
    )
    judged = Judged(*latest_failures(retry.output), cluster.max_bad_rows)
    return replace(own, judged=judged)


def _judged(found: Outcome, job: Job) -> Outcome:
    """The same, and whether too many answers failed; those that retries have mended did not."""
    counts = found.stats.rows, found.stats.bad_rows
    if retry_numbers(Store(job.output).names(RETRY_ROUNDS)):
        try:
            counts = latest_failures(job.output)
        except ConfigError as error:  # no reason to keep quiet about the run
            log.warning("judged without its retries: %s", error)
    return replace(found, judged=Judged(*counts, job.cluster.max_bad_rows))


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """Set at the first signal to stop; the second raises. Only the main thread hears signals.

    Raises:
        KeyboardInterrupt: At the second.
    """
    stop = threading.Event()

    def hear(_signal: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, hear) for number in filter(heard, STOP_SIGNALS)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_apart(source: Source, output: str) -> None:
    """Refuse an output whose files would be input.

    Raises:
        ConfigError: It is one.
    """
    own = (PLAN_NAME, Shard(0, "0" * 16, ()).part_name)
    if source.would_take(output, [object_name(number, name) for number in (0, 1) for name in own]):
        raise ConfigError(
            f"output: {output} lies where recipe.input.uri would take its files for input; choose "
            "a place outside, or one whose name begins with _"
        )


def _tell_new(job: Job, plan: Plan) -> None:
    """Of files that nobody asked to plan; the run goes on without a look at them, too."""
    try:
        new = Source(job.recipe.input, AT_START).unplanned(
            {source for source, _ in plan.shards.files}
        )
    except ConfigError as error:
        log.warning("whether there are new input files is not known: %s", error)
        return
    if new:
        log.warning(
            "%d input files are new since the run began (%s); --extend plans them",
            len(new),
            new[0],
        )


def _shard_rows(job: Job, files: Sequence[SourceFile], driver: Driver) -> int:
    """As configured, or measured on the first rows."""
    rows, seconds = sum(file.rows for file in files), 0.0
    if job.cluster.shard_rows is None and rows > 0:
        seconds = driver.calibrate(first_spans(files, CALIBRATION_ROWS))
    return shard_rows(job.cluster, rows, driver.most_workers, seconds)

"""What gc2ray does with a job: read it, check it, predict its cost, run it.

Each function imports what it needs when it is called: torch, Ray and pyarrow take seconds.

Every function raises `ConfigError` where a setting, an input or an output cannot be used, and
`OSError` where a storage does not answer. Examples assume `job.yaml` of six rows, output `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gc2ray.core.arguments import as_tuple
from gc2ray.core.config.locations import Location, as_location
from gc2ray.core.logs import LogForm

if TYPE_CHECKING:
    from gc2ray.core.config.job import Job
    from gc2ray.engine.parity.result import Parity
    from gc2ray.estimation.estimate import Estimate
    from gc2ray.estimation.recommendation import Tuning
    from gc2ray.output.planner import Outcome
    from gc2ray.runner.messages import Display


def load_job(file: str | Path, *overrides: str) -> Job:
    """Read a job from its YAML file.

    Args:
        file: YAML with `output`, `recipe` and `cluster`.
        overrides: Settings in place of the file's, as `"recipe.compression.retention=0.5"`.

    Example:
        >>> job = gc2ray.load_job("job.yaml", "recipe.compression.retention=0.5")
        >>> job.recipe.compression.retention
        0.5
    """
    from gc2ray.core.config.job import load_job as read

    return read(Path(file), overrides)


def run(
    job: Job, address: str | None = None, *, extend: bool = False, display: Display | None = None
) -> Outcome:
    """Answer every row of a job on Ray; run it again to resume an interrupted run.

    Args:
        job: What is computed, and how.
        address: Ray cluster to join; None: `RAY_ADDRESS`, or else a Ray on this machine.
        extend: Also plan input files that are new since the run began.
        display: Called about once a second with the state of the run.

    Returns:
        `is_complete` says whether every row is answered; `stats` has the numbers.

    Raises:
        GivenUp: The run stopped before its end.
        Interrupted: A signal stopped it.

    Example:
        >>> outcome = gc2ray.run(gc2ray.load_job("job.yaml"))
        >>> outcome.is_complete, outcome.rows, outcome.stats.bad_rows
        (True, 6, 0)
    """
    from gc2ray.runner.run import run_job

    return run_job(_job(job), address=address, display=display, extend=extend)


def submit(
    job: Job,
    address: str,
    *,
    submission_id: str | None = None,
    extend: bool = False,
    log: str = LogForm.TEXT,
) -> str:
    """Hand a job in to the job server of a Ray cluster; returns the job's name there.

    Args:
        job: Its paths are URLs, or the same on every node.
        address: Address of the job server, as `http://head:8265`.
        submission_id: Name of the job on the cluster; None: the server chooses one.
        extend: As for `run`.
        log: Form of its log lines: `"text"` or `"json"`.

    Example:
        >>> gc2ray.submit(job, "http://head:8265", submission_id="captions")  # doctest: +SKIP
        'captions'
    """
    from gc2ray.runner.submit import JobServer

    _job(job).check_portable()
    command = ["--log", LogForm(log), "run", *(["--extend"] if extend else [])]
    return JobServer(address).submit(job, command, submission_id)


def estimate(  # noqa: PLR0913 - assumptions, given by name
    job: Job,
    *,
    rows: int | None = 1000,
    like: Location | None = None,
    output_tokens: float | None = None,
    hours: float = 1.0,
    hardware: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Estimate:
    """Estimate what a run would cost: tokens, hours, bytes and US dollars; no weights are loaded.

    Args:
        job: What would be computed.
        rows: Rows whose image headers and prompts are read; None: all, so that tokens before
            compression are exact.
        like: Output of an earlier run of this model, whose measured rates are used.
        output_tokens: Tokens of an answer, on average; None: measured, or at most `max_new_tokens`.
        hours: Time in which the run should end; says how many workers are suggested.
        hardware: YAML of devices and prices in place of gc2ray's own.
        progress: Called with the number of rows that were read.

    Example:
        >>> estimate = gc2ray.estimate(gc2ray.load_job("job.yaml"))
        >>> estimate.rows, estimate.prompts.mid
        (6, 6.0)
    """
    from gc2ray.estimation.estimate import Assumptions, estimate_run
    from gc2ray.estimation.hardware import load_hardware
    from gc2ray.estimation.measured_rates import MeasuredRates
    from gc2ray.output.totals import read_totals

    earlier = None if like is None else read_totals(as_location("--like", like))
    rates = None if earlier is None else MeasuredRates.from_totals(earlier)
    assumptions = Assumptions(output_tokens=output_tokens, rates=rates, hours=hours)
    return estimate_run(_job(job), load_hardware(hardware), assumptions, rows, progress)


def tune(  # noqa: PLR0913 - settings of one measurement, given by name
    job: Job,
    *,
    rows: int = 200,
    methods: str | Sequence[str] = (),
    retentions: float | Sequence[float] = (),
    min_agreement: float | None = None,
    min_accuracy: float | None = None,
    budget_usd: float | None = None,
    reference: str | None = None,
    usd_per_hour: float | None = None,
    hardware: str | Path | None = None,
    svg: str | Path | None = None,
) -> Tuning:
    """Measure on this device which method and retention meet a target on your rows.

    Args:
        job: Model, input and generation settings.
        rows: Rows that every setting answers.
        methods: Compression methods; none: the recipe's.
        retentions: Fractions of visual tokens that are kept; none: 0.75 to 0.05.
        min_agreement: Target: share of answers equal to the uncompressed; 0.95 without a target.
        min_accuracy: Target: share of answers that are right; needs `reference`.
        budget_usd: Target: the best quality that answers all rows for this price.
        reference: Column with right answers, which `recipe.input.keep` names.
        usd_per_hour: Price of this device; None: the hardware table's.
        hardware: As for `estimate`.
        svg: File to draw quality against time into.

    Returns:
        `recommended` is None where no setting meets the target.

    Example:
        >>> tuning = gc2ray.tune(gc2ray.load_job("job.yaml"), rows=4, retentions=[0.5])
        >>> [measured.setting.name for measured in tuning.measured]
        ['none at 1', 'globalcom2 at 0.5']
    """
    from gc2ray.estimation.hardware import Prices, load_hardware
    from gc2ray.estimation.recommendation import Target
    from gc2ray.estimation.tune import TuneRequest, tune_run
    from gc2ray.reporting.charts import tuning_chart
    from gc2ray.reporting.writing import check_file, write_file

    check_file("svg", svg)
    request = TuneRequest(
        rows=rows,
        methods=as_tuple(methods),
        retentions=as_tuple(retentions),
        target=Target(min_agreement, min_accuracy, budget_usd),
        reference=reference,
        prices=Prices(load_hardware(hardware), usd_per_hour=usd_per_hour),
    )
    tuning = tune_run(_job(job), request)
    if svg is not None:
        write_file(Path(svg), tuning_chart(tuning).encode())
    return tuning


def check(job: Job, rows: int = 16) -> Parity:
    """Compare gc2ray with stock transformers, and batches with single rows, on your rows.

    Args:
        job: Its model and input are used.
        rows: How many rows are compared.

    Example:
        >>> gc2ray.check(gc2ray.load_job("job.yaml"), rows=2).passed
        True
    """
    from gc2ray.engine.parity.check import check_parity

    return check_parity(_job(job), rows)


def _job(job: Job) -> Job:
    if not hasattr(job, "recipe"):
        raise TypeError(f"{job!r} is no Job: gc2ray.load_job reads one from its YAML file")
    return job

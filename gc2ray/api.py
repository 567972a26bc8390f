"""What gc2ray does, as functions: `import gc2ray` offers them, and the command line calls them.

`load_model` and `read_answers` come from other modules; `follow` and `terminal` are here alone.

Each function imports what it needs when it is called: torch, Ray and pyarrow take seconds.

Every function raises `ConfigError` where a setting, an input or an output cannot be used, and
`OSError` where a storage does not answer. Examples assume `job.yaml` of six rows, output `out`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gc2ray.core.arguments import PriceKind, ReferenceLists, as_tuple
from gc2ray.core.config.locations import Location, as_location, as_locations
from gc2ray.core.errors import ConfigError, GivenUp, explain
from gc2ray.core.logs import LogForm, set_up, writes_json
from gc2ray.core.process import INTERRUPTED, Stopped, unexpected

if TYPE_CHECKING:
    from gc2ray.core.config.job import Job
    from gc2ray.engine.parity.result import Parity
    from gc2ray.estimation.estimate import Estimate
    from gc2ray.estimation.recommendation import Tuning
    from gc2ray.output.compact import Dataset
    from gc2ray.output.planner import Outcome, RunStatus
    from gc2ray.output.retry import Retried
    from gc2ray.output.verify import Verdict
    from gc2ray.reporting.evaluation import Evaluation
    from gc2ray.reporting.terminal import Terminal
    from gc2ray.reporting.writing import WrittenReport
    from gc2ray.runner.messages import Display

__all__ = [
    "check", "compact", "estimate", "evaluate", "load_job", "report", "retry", "run", "show",
    "status", "submit", "tune", "verify",
]  # fmt: skip
# What the command line needs besides, so that it imports this module alone.
__all__ += [
    "INTERRUPTED", "ConfigError", "GivenUp", "LogForm", "PriceKind", "ReferenceLists", "Stopped",
    "explain", "follow", "set_up", "terminal", "unexpected", "writes_json",
]  # fmt: skip


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


def retry(
    output: Location,
    *overrides: str,
    statuses: str | Sequence[str] = (),
    address: str | None = None,
    display: Display | None = None,
) -> Retried:
    """Answer the rows that failed again, as a new round of the output; raises what `run` does.

    Args:
        output: Output of a run that is complete but for its failures.
        overrides: Settings of the cluster, as `"cluster.max_bad_rows=1"`.
        statuses: Only rows with these statuses, or `"dead"` ones; none: all that failed.
        address: As for `run`.
        display: As for `run`.

    Example:
        >>> gc2ray.retry("out").retry_round is None  # nothing failed
        True
    """
    from gc2ray.core.config.job import load_cluster
    from gc2ray.runner.run import retry_output

    where, cluster = as_location("OUTPUT", output), load_cluster(overrides)
    return retry_output(where, cluster, as_tuple(statuses), address, display)


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


def follow(address: str, submission_id: str, write: Callable[[str], object]) -> int:
    """Pass on what a submitted job prints until it ends; returns its exit code."""
    from gc2ray.runner.submit import JobServer

    return JobServer(address).follow(submission_id, write)


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


def status(output: Location) -> RunStatus:
    """Read how far a run is, from its output alone.

    Example:
        >>> gc2ray.status("out").outcome.is_complete
        True
    """
    from gc2ray.output.planner import read_status

    return read_status(as_location("OUTPUT", output))


def verify(output: Location, *, deep: bool = False) -> Verdict:
    """Check that an output holds every planned row exactly once; `problems` says what is wrong.

    Args:
        output: Output of a run.
        deep: Read every answer, and not only the footers of files.

    Example:
        >>> gc2ray.verify("out", deep=True).problems
        ()
    """
    from gc2ray.output.verify import verify as check_output

    return check_output(as_location("OUTPUT", output), deep=deep)


def compact(
    output: Location,
    destination: Location,
    *,
    file_bytes: int = 512 << 20,
    incomplete: bool = False,
) -> Dataset:
    """Write the latest answers as a dataset of a few large Parquet files, in input order.

    Args:
        output: Output of a run.
        destination: Directory or URL of the dataset; empty, or not there yet.
        file_bytes: Size of its files.
        incomplete: Accept an output where rows are not answered yet.

    Example:
        >>> [file.name for file in gc2ray.compact("out", "dataset").files]
        ['part-00000.parquet']
    """
    from gc2ray.output.compact import compact as write

    where, to = as_location("OUTPUT", output), as_location("DESTINATION", destination)
    return write(where, to, file_bytes=file_bytes, incomplete=incomplete)


def report(  # noqa: PLR0913 - settings, given by name
    *outputs: Location,
    to: Location | None = None,
    price: str = PriceKind.ON_DEMAND,
    usd_per_hour: float | None = None,
    hardware: str | Path | None = None,
    show: int = 0,
    rows: str | Sequence[str] = (),
    card: bool = True,
    progress: Callable[[int], None] | None = None,
) -> WrittenReport:
    """Write a report of runs as a page, a text and JSON; returns the names of the files.

    Args:
        outputs: Outputs of one run or several.
        to: Directory or URL for the report; None: `report/` in the first output.
        price: `"on_demand"` or `"spot"` prices of the hardware table.
        usd_per_hour: Price of one device, in place of the table's.
        hardware: As for `estimate`.
        show: Draw the kept tokens of so many rows; loads the model and reads their images.
        rows: Rows to draw, by their `row_key`.
        card: Also write a dataset card, `README.md`, into each output.
        progress: Called with the number of parts that were read.

    Example:
        >>> gc2ray.report("out", card=False).files[0].endswith("out/report/report.html")
        True
    """
    from gc2ray.estimation.hardware import Prices, load_hardware
    from gc2ray.reporting.writing import ReportRequest, write_report

    prices = Prices(load_hardware(hardware), price, usd_per_hour)
    where = None if to is None else as_location("--to", to)
    request = ReportRequest(prices, where, show, as_tuple(rows), card=card)
    return write_report(as_locations("OUTPUT", outputs), request, progress or (lambda _: None))


def show(output: Location, row_key: str, to: str | Path | None = None) -> Path:
    """Draw the visual tokens that were kept of a row's image; returns the file's path.

    Args:
        output: Output of a run.
        row_key: The row, as the column `row_key` names it.
        to: PNG to write; None: named for output and row, in the working directory.

    Example:
        >>> gc2ray.show("out", "in.parquet#0", "tokens.png").name
        'tokens.png'
    """
    from gc2ray.reporting.heat_map import heat_map
    from gc2ray.reporting.show import image_name, map_tokens
    from gc2ray.reporting.writing import write_file

    where = as_location("OUTPUT", output)
    path = Path(to or image_name(where, row_key))
    write_file(path, heat_map(next(map_tokens(where, [row_key]))))
    return path


def evaluate(
    *outputs: Location,
    reference: str,
    metrics: str | Sequence[str] = (),
    by: str | None = None,
    lists: str | None = None,
) -> Evaluation:
    """Score the latest answers of runs against a column of right answers, with 95% intervals.

    Args:
        outputs: Outputs of one run or several; the first is compared with each other one.
        reference: Column with the right answer or a list of them, which `recipe.input.keep` names.
        metrics: Some of `exact_match`, `vqa_accuracy`, `contains`, `anls`, `yes_no`; none: all.
        by: Column to group answers by.
        lists: What a list of references is where rows have several prompts: `"any"`: each entry is
            right for every prompt; `"each"`: one entry for each prompt.

    Example:
        >>> evaluation = gc2ray.evaluate("out", reference="reference", metrics=["exact_match"])
        >>> evaluation.runs[0].scores["all"]["exact_match"].rows
        6
    """
    from gc2ray.reporting.evaluation import EvaluateRequest, evaluate_runs

    request = EvaluateRequest(reference, as_tuple(metrics), by, lists)
    return evaluate_runs(as_locations("OUTPUT", outputs), request)


def terminal() -> Terminal:
    """Shows the results of these functions to people, as tables and progress bars."""
    from gc2ray.reporting.terminal import Terminal

    return Terminal()


def _job(job: Job) -> Job:
    if not hasattr(job, "recipe"):
        raise TypeError(f"{job!r} is no Job: gc2ray.load_job reads one from its YAML file")
    return job

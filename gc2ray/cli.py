"""The command line: arguments, logging, one call, exit code.

Exit codes: 0 every planned row is committed, and not too many answers failed; 1 they did, or
something was given up; 2 the configuration cannot be used; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gc2ray import __version__
from gc2ray.core.errors import ConfigError, GivenUp, Interrupted, storage_errors
from gc2ray.core.logs import LogForm, set_up, writes_json
from gc2ray.core.process import INTERRUPTED, Stopped, run_process, unexpected

if TYPE_CHECKING:
    from gc2ray.output.heartbeats import WorkerRecord
    from gc2ray.report.page import RowImages

# Everything else is imported where it is used: torch, transformers and Ray take seconds to import,
# and `--help`, a typo in the configuration or `status` should not wait for them.

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Answer a Parquet of images and prompts with a compressed vision-language model on Ray.",
)
Config = Annotated[Path, typer.Argument(help="YAML with output, recipe and cluster.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as a.b=c.", show_default=False)
]
Address = Annotated[
    str | None, typer.Option(help="Ray cluster to join; else RAY_ADDRESS, else this machine.")
]
Extend = Annotated[
    bool, typer.Option("--extend", help="Plan input files that are new since the run began, too.")
]
HardwareFile = Annotated[
    Path | None,
    typer.Option("--hardware", help="YAML of devices and prices in place of gc2ray's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one document of JSON instead.")]
Output = Annotated[str, typer.Argument(help="Output directory or URL of a run.")]
REFUSED = "if it refused, are the credentials good? Run the same command again to go on"
EXIT_CODES = (0, 1, 2, 130)

log = logging.getLogger(__name__)


def _finite(value: float | list[float] | None) -> float | list[float] | None:
    """Refuse NaN, which no limit of an option stops, and infinity."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a number to reckon with.")
    return value


class PriceKind(StrEnum):
    """Kinds of prices in a table of hardware."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


def main() -> None:
    """The `gc2ray` command, as scripts of earlier installations begin it."""
    run_process(app)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    extend: Extend = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Answer every row; run again to go on where it was left."""
    with _exit_codes():
        from gc2ray.core.config.job import load_job
        from gc2ray.report.terminal import print_outcome, run_display
        from gc2ray.runner.run import run_job

        job = load_job(config, overrides or [])
        console = Console()
        with run_display(console) as display:
            outcome = run_job(job, address=address, display=display, extend=extend)
        print_outcome(console, outcome, job.output)
        raise typer.Exit(outcome.exit_code)


@app.command()
def submit(  # noqa: PLR0913 - typer makes an option of each
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server: http://head:8265."
        ),
    ] = "http://127.0.0.1:8265",
    follow: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--follow", help="Print what it prints; end with its exit code.")
    ] = False,
    submission_id: Annotated[
        str | None, typer.Option("--id", help="Name of the job on the cluster; else one is drawn.")
    ] = None,
    extend: Extend = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Run a job on a Ray cluster; submit it again to go on where it was left."""
    with _exit_codes():
        from gc2ray.core.config.job import load_job
        from gc2ray.runner.submit import JobServer

        job = load_job(config, overrides or [])
        job.check_portable()
        server = JobServer(address)
        for handler in logging.getLogger("ray").handlers:  # it would tell of its requests
            handler.setLevel(logging.WARNING)
        command = ["--log", str(context.obj), "run", *(["--extend"] if extend else [])]
        submission_id = server.submit(job, command, submission_id)
        typer.echo(f"submitted {submission_id}; how far it is: gc2ray status {job.output}")
        if follow:
            code = server.follow(submission_id, lambda text: typer.echo(text, nl=False))
            if code not in EXIT_CODES:
                raise GivenUp(f"{submission_id} ended with exit code {code}; submit it to go on")
            raise typer.Exit(code)


@app.command()
def estimate(  # noqa: PLR0913 - typer makes an option of each
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows whose image headers and prompts are read.")
    ] = 1000,
    all_rows: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--all", help="Read those of all rows: tokens are exact then.")
    ] = False,
    like: Annotated[
        str | None,
        typer.Option(help="Output of an earlier run of this model, whose pace and answers count."),
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(callback=_finite, min=1, help="Tokens of an answer, on average.")
    ] = None,
    hours: Annotated[
        float,
        typer.Option(
            callback=_finite, min=0.01, help="Suggest as many workers as end within these."
        ),
    ] = 1.0,
    hardware: HardwareFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Say what a run would cost in tokens, time, memory and money, by headers alone."""
    with _exit_codes():
        from gc2ray.core.config.job import load_job
        from gc2ray.estimate.estimate import Assumptions
        from gc2ray.estimate.estimate import estimate as found_for
        from gc2ray.estimate.hardware import load_hardware
        from gc2ray.estimate.input_profile import profile_input
        from gc2ray.estimate.measured_rates import MeasuredRates
        from gc2ray.models.checkpoint.fetch import fetch_metadata
        from gc2ray.models.loading import load_metadata
        from gc2ray.output.totals import read_totals
        from gc2ray.report.terminal import counter
        from gc2ray.report.terminal_tables import print_estimate

        job = load_job(config, overrides or [])
        table = load_hardware(hardware)
        rates = MeasuredRates.from_totals(read_totals(like)) if like else None
        recipe = job.recipe
        model = load_metadata(
            str(fetch_metadata(recipe.model)),
            dtype=recipe.model.dtype,
            taken_over=recipe.generation.taken_over(),
        )
        with counter("rows read") as count:
            looked = profile_input(recipe, model, None if all_rows else rows, count)
        assumed = Assumptions(output_tokens=output_tokens, rates=rates, hours=hours)
        found = found_for(looked, model, job, table, assumed)
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            print_estimate(Console(), found, job)


@app.command()
def tune(  # noqa: PLR0913 - typer makes an option of each
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=4, help="Rows to answer in every setting.")] = 200,
    method: Annotated[list[str] | None, typer.Option(help="Methods; else the recipe's.")] = None,
    retention: Annotated[
        list[float] | None,
        typer.Option(callback=_finite, help="Fractions KEPT; else 0.75 to 0.05."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            callback=_finite, min=0, max=1, help="Same answers as uncompressed; else 0.95."
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(callback=_finite, min=0, max=1, help="Score against --reference."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Column with right answers; recipe.input.keep must name it.")
    ] = None,
    budget_usd: Annotated[
        float | None,
        typer.Option(callback=_finite, min=0, help="All rows for this; then the best quality."),
    ] = None,
    usd_per_hour: Annotated[
        float | None,
        typer.Option(callback=_finite, min=0, help="Of this device, in place of the table's."),
    ] = None,
    hardware: HardwareFile = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw quality against time, the Pareto front.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Measure on this device which retention and method pay on your rows, and say if none does."""
    with _exit_codes():
        from gc2ray.core.config.job import load_job
        from gc2ray.estimate.hardware import Prices, load_hardware
        from gc2ray.estimate.recommendation import Target
        from gc2ray.estimate.tune import TuneRequest
        from gc2ray.estimate.tune import tune as tune_job
        from gc2ray.report.terminal_tables import front_chart, print_tuning

        wish = TuneRequest(
            rows=rows,
            methods=tuple(method or ()),
            retentions=tuple(retention or ()),
            target=Target(min_agreement, min_accuracy, budget_usd),
            reference=reference,
            prices=Prices(load_hardware(hardware), usd_per_hour=usd_per_hour),
        )
        found = tune_job(load_job(config, overrides or []), wish)
        if svg is not None:
            _write(svg, front_chart(found).encode())
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        else:
            print_tuning(Console(), found)
        raise typer.Exit(0 if found.recommended is not None else 1)


@app.command()
def status(output: Output) -> None:
    """Say how far a run is, from its output alone; exit code 0 only when it is complete."""
    with _exit_codes():
        from gc2ray.output.heartbeats import worker_records
        from gc2ray.output.planner import committed_parts, outcome
        from gc2ray.output.run_directory import open_first_round
        from gc2ray.report.terminal import print_outcome

        first = open_first_round(output)
        state = outcome(first.store, first.plan, committed_parts(first.store, first.plan))
        console = Console()
        console.print(f"{state.shards} of {state.planned_shards} shards committed")
        print_outcome(console, state, output)
        console.print(_worker_table(worker_records(first.store)))
        raise typer.Exit(state.exit_code)


@app.command()
def retry(
    output: Output,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as cluster.b=c.", show_default=False)
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows with this status, or `dead` ones; may be given several times."
        ),
    ] = None,
    address: Address = None,
) -> None:
    """Answer the rows that failed again, into retry_rounds/N; run the command again to resume."""
    with _exit_codes():
        from gc2ray.core.config.job import load_cluster
        from gc2ray.output.planner import Judged
        from gc2ray.output.retry import FAILURES, latest_failures, next_retry
        from gc2ray.report.terminal import print_outcome, run_display
        from gc2ray.runner.run import run_retry

        cluster, console = load_cluster(overrides or []), Console()
        chosen = next_retry(output, status or FAILURES)
        if chosen is None:
            told = f"{output}: no row is to be answered anew"
            console.print(told, markup=False, soft_wrap=True)
            left = Judged(*latest_failures(output), cluster.max_bad_rows)  # of another status
            if left.is_too_many:
                console.print(str(left), soft_wrap=True)
            raise typer.Exit(1 if left.is_too_many else 0)
        with run_display(console) as display:
            outcome = run_retry(chosen, cluster, address=address, display=display)
        print_outcome(console, outcome, output, chosen.number)
        raise typer.Exit(outcome.exit_code)


@app.command()
def report(  # noqa: PLR0913 - typer makes an option of each
    outputs: Annotated[
        list[str], typer.Argument(help="Output of a run, or of several to see side by side.")
    ],
    to: Annotated[
        str | None, typer.Option(help="Directory or URL; else report/ in the first output.")
    ] = None,
    price: Annotated[PriceKind, typer.Option(help="Which prices of the table.")] = (
        PriceKind.ON_DEMAND
    ),
    usd_per_hour: Annotated[
        float | None,
        typer.Option(callback=_finite, min=0, help="Of one device, in place of the table's."),
    ] = None,
    hardware: HardwareFile = None,
    show: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw what was kept of so many rows, those whose audit differs most first; loads "
            "the model and reads their images.",
        ),
    ] = 0,
    row: Annotated[
        list[str] | None, typer.Option(help="A row to draw, by its row_key; may be repeated.")
    ] = None,
    card: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option(help="Also write the dataset card of each output, README.md.")
    ] = True,
) -> None:
    """Tell what runs did and cost: a page, a text and JSON, from footers and records alone."""
    with _exit_codes():
        from gc2ray.core.config.locations import check_place
        from gc2ray.data.store import Store
        from gc2ray.estimate.hardware import Prices, load_hardware
        from gc2ray.output.totals import read_totals
        from gc2ray.report.dataset_card import CARD_NAME, write_card
        from gc2ray.report.page import report as told
        from gc2ray.report.summary import summarise
        from gc2ray.report.terminal import counter

        place = to or f"{outputs[0].rstrip('/')}/report"
        check_place("--to" if to else "OUTPUT", place)
        prices = Prices(load_hardware(hardware), str(price), usd_per_hour)
        with counter("parts read") as count:
            ledgers = [read_totals(output, count) for output in outputs]
        summaries = [summarise(ledger, prices) for ledger in ledgers]
        pictures = {
            summary.output: _pictures(summary.output, [*(row or ()), *summary.telling_rows(show)])
            for summary in summaries
        }
        found = told(summaries, pictures)
        store = Store(place)
        for name, text in (("html", found.html), ("md", found.markdown), ("json", found.json)):
            store.replace(f"report.{name}", text.encode())
        store.tidy()
        console = Console(markup=False, soft_wrap=True)
        console.print(f"{store.uri}/report.html, .md, .json")
        for output, summary in zip(outputs, summaries, strict=True) if card else ():
            written = write_card(Store(output), summary)
            name = f"{output.rstrip('/')}/{CARD_NAME}"
            console.print(name if written else f"{name} is your own, and stays as it is")


def _pictures(output: str, keys: Sequence[str]) -> list[RowImages]:
    """Of some rows of an output; the model is loaded only where there are any."""
    if not keys:
        return []
    from gc2ray.report.page import RowImages
    from gc2ray.report.show import map_tokens

    return [
        RowImages.from_token_map(looked) for looked in map_tokens(output, list(dict.fromkeys(keys)))
    ]


@app.command()
def show(
    output: Output,
    row_key: Annotated[str, typer.Argument(help="A row, as the column row_key names it.")],
    to: Annotated[
        Path | None, typer.Option(help="The PNG to write; else named for the row, here.")
    ] = None,
) -> None:
    """Draw what was kept of a row's image, and which scores commanded it; loads the model."""
    with _exit_codes():
        from gc2ray.report.heat_map import heat_map
        from gc2ray.report.show import image_name, map_tokens

        path = to or Path(image_name(output, row_key))
        _write(path, heat_map(next(map_tokens(output, [row_key]))))
        Console().print(str(path), markup=False, soft_wrap=True)


@app.command()
def verify(
    output: Output,
    deep: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--deep", help="Read every answer, not only the ends of files.")
    ] = False,
) -> None:
    """Say whether an output holds what was planned, every row once; exit code 0 only if it does."""
    with _exit_codes():
        from gc2ray.output.verify import verify as look_at
        from gc2ray.report.terminal import print_verdict

        verdict = look_at(output, deep=deep)
        print_verdict(Console(), verdict, output)
        raise typer.Exit(verdict.exit_code)


@app.command()
def compact(
    output: Output,
    destination: Annotated[
        str, typer.Argument(help="Directory or URL of the dataset; empty, or not there yet.")
    ],
    file_mb: Annotated[int, typer.Option(min=1, help="Size of its files in MiB.")] = 512,
    incomplete: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--incomplete", help="Also where rows are not answered yet.")
    ] = False,
) -> None:
    """Write the latest answers as a plain dataset of large files, in input order."""
    with _exit_codes():
        from gc2ray.core.config.locations import check_place
        from gc2ray.output.compact import compact as write

        check_place("DESTINATION", destination)
        dataset = write(output, destination, file_bytes=file_mb << 20, incomplete=incomplete)
        Console().print(
            f"{dataset.answers:,} answers to {dataset.rows:,} rows, {dataset.failed:,} of them "
            f"failed, in {len(dataset.files):,} files: {destination}",
            markup=False,
            soft_wrap=True,
        )


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare.")] = 16,
) -> None:
    """Compare with stock transformers, and batches with single rows, on your model and rows."""
    with _exit_codes():
        from gc2ray.core.config.job import load_job
        from gc2ray.engine.parity import check as check_parity

        parity = check_parity(load_job(config, overrides or []), rows)
        console = Console()
        for line in parity.lines():
            console.print(line, markup=False, soft_wrap=True)
        console.print("[bold green]passed[/]" if parity.passed else "[bold red]failed[/]")
        raise typer.Exit(0 if parity.passed else 1)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _version(show: bool | None) -> None:  # noqa: FBT001 - typer calls it so
    if show:
        typer.echo(f"gc2ray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    _show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
    log: Annotated[
        LogForm, typer.Option(help="Lines on stderr: for people, or with ids for programs.")
    ] = LogForm.TEXT,
) -> None:
    set_up(log)
    context.obj = log
    # Ray workers started under `uv run` would rebuild the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn the project's errors, and all others, into a line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except (Stopped, KeyboardInterrupt):
        raise _ended(INTERRUPTED, 130) from None
    except Exception as error:
        if writes_json() and _is_bug(error):
            log.exception("unexpected: %s; this is a bug", type(error).__name__)
            raise typer.Exit(1) from None
        raise _ended(*_told(error)) from None


def _is_bug(error: Exception) -> bool:
    return not isinstance(error, (ConfigError, GivenUp, Interrupted, *storage_errors()))


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    match error:
        case ConfigError():
            return f"configuration: {error}", 2
        case GivenUp():
            return f"given up: {error}", 1
        case Interrupted():
            return f"interrupted: {error}; run the same command again to go on", 130
    if _is_bug(error):
        return unexpected(error), 1
    said = " ".join(str(error).split())
    told = ": ".join([*getattr(error, "__notes__", ()), type(error).__name__, said])
    return f"storage: {told}; {REFUSED}", 1


def _ended(line: str, code: int) -> typer.Exit:
    """Say how a command ends."""
    console = Console(stderr=True, emoji=False, highlight=False)
    console.print(line, markup=False, soft_wrap=True)
    return typer.Exit(code)


def _worker_table(records: Iterable[WorkerRecord]) -> Table:
    """Nothing in it is cut: what is too long for its column goes on in the next line."""
    table = Table(title="worker processes so far (UTC)")
    names = ("node", "pid", "device")
    times = ("started", "loaded", "last_seen")
    for name in names:
        table.add_column(name, overflow="fold", min_width=4)
    for name in times:
        table.add_column(name, overflow="fold", min_width=10)  # of a date
    for record in records:
        cells = [str(getattr(record, name)) for name in names]
        table.add_row(*map(escape, cells + [_seconds(getattr(record, name)) for name in times]))
    return table


def _seconds(time: datetime | None) -> str:
    """A time of a record as people read it."""
    return "None" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"

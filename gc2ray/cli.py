"""The command line: each command reads its options, calls `gc2ray.api`, and shows the result.

Exit codes: 0 every planned row is committed, and not too many answers failed; 1 they did, or
something was given up; 2 the configuration cannot be used; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gc2ray import __version__, api

log = logging.getLogger(__name__)


def _finite(value: float | list[float] | None) -> float | list[float] | None:
    """Refuse NaN, which no limit of an option stops, and infinity."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number.")
    return value


app = typer.Typer(
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
    bool, typer.Option("--extend", help="Also plan input files that are new since the run began.")
]
HardwareFile = Annotated[
    Path | None,
    typer.Option("--hardware", help="YAML of devices and prices in place of gc2ray's own."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Usd = Annotated[
    float | None,
    typer.Option(
        "--usd-per-hour", callback=_finite, min=0, help="Price of one device, not the table's."
    ),
]
Output = Annotated[str, typer.Argument(help="Output directory or URL of a run.")]
EXIT_CODES = (0, 1, 2, 130)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    extend: Extend = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Answer every row of a job; run it again to resume."""
    with _exit_codes():
        job, terminal = api.load_job(config, *overrides or []), api.terminal()
        with terminal.display() as display:
            outcome = api.run(job, address, extend=extend, display=display)
        terminal.outcome(outcome, job.output)
        raise typer.Exit(outcome.exit_code)


@app.command()
def submit(  # noqa: PLR0913 - typer makes an option of each
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server.")
    ] = "http://127.0.0.1:8265",
    follow: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool,
        typer.Option("--follow", help="Print the job's output, and end with its exit code."),
    ] = False,
    submission_id: Annotated[
        str | None,
        typer.Option("--id", help="Name of the job on the cluster; else the server chooses one."),
    ] = None,
    extend: Extend = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Run a job on a Ray cluster; submit it again to resume."""
    with _exit_codes():
        job, form = api.load_job(config, *overrides or []), str(context.obj)
        name = api.submit(job, address, submission_id=submission_id, extend=extend, log=form)
        typer.echo(f"submitted {name}; to see its progress: gc2ray status {job.output}")
        if follow:
            code = api.follow(address, name, lambda text: typer.echo(text, nl=False))
            if code not in EXIT_CODES:
                raise api.GivenUp(f"{name} ended with exit code {code}; submit it again to resume")
            raise typer.Exit(code)


@app.command()
def estimate(  # noqa: PLR0913 - typer makes an option of each
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Rows whose image headers and prompts are read.")
    ] = 1000,
    all_rows: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--all", help="Read those of all rows, which makes tokens exact.")
    ] = False,
    like: Annotated[
        str | None,
        typer.Option(help="Output of an earlier run of this model, whose measured rates count."),
    ] = None,
    output_tokens: Annotated[
        float | None, typer.Option(callback=_finite, min=1, help="Tokens of an answer, on average.")
    ] = None,
    hours: Annotated[
        float,
        typer.Option(callback=_finite, min=0.01, help="Suggest workers for a run of this length."),
    ] = 1.0,
    hardware: HardwareFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Estimate a run's tokens, time, memory and cost from headers."""
    with _exit_codes():
        job, terminal = api.load_job(config, *overrides or []), api.terminal()
        with terminal.counter("rows read") as count:
            result = api.estimate(
                job,
                rows=None if all_rows else rows,
                like=like,
                output_tokens=output_tokens,
                hours=hours,
                hardware=hardware,
                progress=count,
            )
        _print_json(result.to_dict()) if as_json else terminal.estimate(result, job)


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
        typer.Option(callback=_finite, min=0, max=1, help="Share of equal answers; else 0.95."),
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
        typer.Option(callback=_finite, min=0, help="Best quality for this price of all rows."),
    ] = None,
    usd_per_hour: Usd = None,
    hardware: HardwareFile = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw quality against time, the Pareto front.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Measure which method and retention pay on your rows."""
    with _exit_codes():
        result = api.tune(
            api.load_job(config, *overrides or []),
            rows=rows,
            methods=method or (),
            retentions=retention or (),
            min_agreement=min_agreement,
            min_accuracy=min_accuracy,
            budget_usd=budget_usd,
            reference=reference,
            usd_per_hour=usd_per_hour,
            hardware=hardware,
            svg=svg,
        )
        _print_json(result.to_dict()) if as_json else api.terminal().tuning(result)
        raise typer.Exit(0 if result.recommended is not None else 1)


@app.command()
def status(output: Output) -> None:
    """Show how far a run is; the exit code is 0 when it is complete."""
    with _exit_codes():
        result = api.status(output)
        api.terminal().status(result, output)
        raise typer.Exit(result.outcome.exit_code)


@app.command()
def retry(
    output: Output,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as cluster.b=c.", show_default=False)
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Only rows of this status, as bad_image, or dead; may be repeated."),
    ] = None,
    address: Address = None,
) -> None:
    """Answer failed rows again, as a new round of the output."""
    with _exit_codes():
        terminal = api.terminal()
        with terminal.display() as display:
            result = api.retry(
                output, *overrides or [], statuses=status or (), address=address, display=display
            )
        terminal.retried(result, output)
        raise typer.Exit(result.exit_code)


@app.command()
def report(  # noqa: PLR0913 - typer makes an option of each
    outputs: Annotated[
        list[str], typer.Argument(help="Output of a run, or of several to see side by side.")
    ],
    to: Annotated[
        str | None, typer.Option(help="Directory or URL; else report/ in the first output.")
    ] = None,
    price: Annotated[api.PriceKind, typer.Option(help="Which prices of the table.")] = (
        api.PriceKind.ON_DEMAND
    ),
    usd_per_hour: Usd = None,
    hardware: HardwareFile = None,
    show: Annotated[
        int, typer.Option(min=0, help="Draw the kept tokens of so many rows; loads the model.")
    ] = 0,
    row: Annotated[
        list[str] | None, typer.Option(help="A row to draw, by its row_key; may be repeated.")
    ] = None,
    card: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option(help="Also write the dataset card of each output, README.md.")
    ] = True,
) -> None:
    """Write what runs did and cost as a page, a text and JSON."""
    with _exit_codes():
        terminal = api.terminal()
        with terminal.counter("parts read") as count:
            written = api.report(
                *outputs,
                to=to,
                price=price,
                usd_per_hour=usd_per_hour,
                hardware=hardware,
                show=show,
                rows=row or (),
                card=card,
                progress=count,
            )
        terminal.written(written)


@app.command()
def show(
    output: Output,
    row_key: Annotated[str, typer.Argument(help="A row, as the column row_key names it.")],
    to: Annotated[
        Path | None, typer.Option(help="The PNG to write; else named for the row, here.")
    ] = None,
) -> None:
    """Draw which visual tokens of a row's image were kept, and why."""
    with _exit_codes():
        api.terminal().line(str(api.show(output, row_key, to)))


@app.command()
def verify(
    output: Output,
    deep: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--deep", help="Read every answer, not only the ends of files.")
    ] = False,
) -> None:
    """Check that an output holds every planned row exactly once."""
    with _exit_codes():
        verdict = api.verify(output, deep=deep)
        api.terminal().verdict(verdict, output)
        raise typer.Exit(verdict.exit_code)


@app.command()
def compact(
    output: Output,
    destination: Annotated[
        str, typer.Argument(help="Directory or URL of the dataset; empty, or not there yet.")
    ],
    file_mb: Annotated[int, typer.Option(min=1, help="Size of its files in MiB.")] = 512,
    incomplete: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--incomplete", help="Accept rows that are not answered yet.")
    ] = False,
) -> None:
    """Write the latest answers as a dataset of large files."""
    with _exit_codes():
        dataset = api.compact(output, destination, file_bytes=file_mb << 20, incomplete=incomplete)
        api.terminal().dataset(dataset, destination)


@app.command()
def evaluate(
    outputs: Annotated[
        list[str], typer.Argument(help="Output of a run, or of several to compare with the first.")
    ],
    reference: Annotated[
        str, typer.Option(help="Column with right answers; recipe.input.keep must name it.")
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Of exact_match, vqa_accuracy, contains, anls, yes_no; else all."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column to group answers by.")] = None,
    lists: Annotated[
        api.ReferenceLists | None,
        typer.Option(help="A list of references is for any prompt, or has one for each."),
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Score answers against a column of right answers."""
    with _exit_codes():
        metrics = tuple(metric or ())
        result = api.evaluate(*outputs, reference=reference, metrics=metrics, by=by, lists=lists)
        _print_json(result.to_dict()) if as_json else api.terminal().evaluation(result)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare.")] = 16,
) -> None:
    """Compare answers with stock transformers, on your rows."""
    with _exit_codes():
        parity = api.check(api.load_job(config, *overrides or []), rows)
        api.terminal().parity(parity)
        raise typer.Exit(0 if parity.passed else 1)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for its model, rows, job and answers.")
    ] = Path("demo-output"),
) -> None:
    """Run a whole job with a small trained model, and score it."""
    with _exit_codes():
        from gc2ray.demo.demo import demo as run_demo

        raise typer.Exit(run_demo(output))


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document))


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
        api.LogForm, typer.Option(help="Lines on stderr: for people, or with ids for programs.")
    ] = api.LogForm.TEXT,
) -> None:
    api.set_up(log)
    context.obj = log
    # Ray workers started under `uv run` would rebuild the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn every error into a line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except (api.Stopped, KeyboardInterrupt):
        raise _ended(api.INTERRUPTED, 130) from None
    except Exception as error:
        explained = api.explain(error)
        if explained is None and api.writes_json():
            log.exception("unexpected: %s; this is a bug", type(error).__name__)
            raise typer.Exit(1) from None
        raise _ended(*explained or (api.unexpected(error), 1)) from None


def _ended(line: str, code: int) -> typer.Exit:
    """Say how a command ends; in JSON where a program reads the lines."""
    if api.writes_json():
        log.error("%s", line)
    else:
        typer.echo(line, err=True)
    return typer.Exit(code)

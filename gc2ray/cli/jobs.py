"""Commands that take a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gc2ray
from gc2ray.api import command_line
from gc2ray.cli.endings import exit_codes, print_json
from gc2ray.cli.options import Address, AsJson, Config, Extend, HardwareFile, Overrides, Usd, finite

EXIT_CODES = (0, 1, 2, 130)


def run(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    extend: Extend = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Answer every row of a job; run it again to resume."""
    with exit_codes():
        job, terminal = gc2ray.load_job(config, *overrides or []), command_line.terminal()
        with terminal.display() as display:
            outcome = gc2ray.run(job, address, extend=extend, display=display)
        terminal.outcome(outcome, job.output)
        raise typer.Exit(outcome.exit_code)


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
    with exit_codes():
        job, form = gc2ray.load_job(config, *overrides or []), str(context.obj)
        name = gc2ray.submit(job, address, submission_id=submission_id, extend=extend, log=form)
        typer.echo(f"submitted {name}; to see its progress: gc2ray status {job.output}")
        if follow:
            code = command_line.follow(address, name, lambda text: typer.echo(text, nl=False))
            if code not in EXIT_CODES:
                raise command_line.GivenUp(
                    f"{name} ended with exit code {code}; submit it again to resume"
                )
            raise typer.Exit(code)


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
        float | None, typer.Option(callback=finite, min=1, help="Tokens of an answer, on average.")
    ] = None,
    hours: Annotated[
        float,
        typer.Option(callback=finite, min=0.01, help="Suggest workers for a run of this length."),
    ] = 1.0,
    hardware: HardwareFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Estimate a run's tokens, time, memory and cost from headers."""
    with exit_codes():
        job, terminal = gc2ray.load_job(config, *overrides or []), command_line.terminal()
        with terminal.counter("rows read") as count:
            result = gc2ray.estimate(
                job,
                rows=None if all_rows else rows,
                like=like,
                output_tokens=output_tokens,
                hours=hours,
                hardware=hardware,
                progress=count,
            )
        print_json(result.to_dict()) if as_json else terminal.estimate(result, job)


def tune(  # noqa: PLR0913 - typer makes an option of each
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=4, help="Rows to answer in every setting.")] = 200,
    method: Annotated[list[str] | None, typer.Option(help="Methods; else the recipe's.")] = None,
    retention: Annotated[
        list[float] | None,
        typer.Option(callback=finite, help="Fractions KEPT; else 0.75 to 0.05."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(callback=finite, min=0, max=1, help="Share of equal answers; else 0.95."),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(callback=finite, min=0, max=1, help="Score against --reference."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Column with right answers; recipe.input.keep must name it.")
    ] = None,
    budget_usd: Annotated[
        float | None,
        typer.Option(callback=finite, min=0, help="Best quality for this price of all rows."),
    ] = None,
    usd_per_hour: Usd = None,
    hardware: HardwareFile = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw quality against time, the Pareto front.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Measure which method and retention pay on your rows."""
    with exit_codes():
        result = gc2ray.tune(
            gc2ray.load_job(config, *overrides or []),
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
        print_json(result.to_dict()) if as_json else command_line.terminal().tuning(result)
        raise typer.Exit(0 if result.recommended is not None else 1)


def check(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to compare.")] = 16,
) -> None:
    """Compare answers with stock transformers, on your rows."""
    with exit_codes():
        parity = gc2ray.check(gc2ray.load_job(config, *overrides or []), rows)
        command_line.terminal().parity(parity)
        raise typer.Exit(0 if parity.passed else 1)

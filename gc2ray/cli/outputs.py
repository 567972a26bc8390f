"""Commands that take the output of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gc2ray
from gc2ray.api import command_line
from gc2ray.cli.endings import exit_codes, print_json
from gc2ray.cli.options import Address, AsJson, HardwareFile, Output, Usd


def status(output: Output) -> None:
    """Show how far a run is; the exit code is 0 when it is complete."""
    with exit_codes():
        result = gc2ray.status(output)
        command_line.terminal().status(result, output)
        raise typer.Exit(result.outcome.exit_code)


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
    with exit_codes():
        terminal = command_line.terminal()
        with terminal.display() as display:
            result = gc2ray.retry(
                output, *overrides or [], statuses=status or (), address=address, display=display
            )
        terminal.retried(result, output)
        raise typer.Exit(result.exit_code)


def report(  # noqa: PLR0913 - typer makes an option of each
    outputs: Annotated[
        list[str], typer.Argument(help="Output of a run, or of several to see side by side.")
    ],
    to: Annotated[
        str | None, typer.Option(help="Directory or URL; else report/ in the first output.")
    ] = None,
    price: Annotated[command_line.PriceKind, typer.Option(help="Which prices of the table.")] = (
        command_line.PriceKind.ON_DEMAND
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
    with exit_codes():
        terminal = command_line.terminal()
        with terminal.counter("parts read") as count:
            written = gc2ray.report(
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


def show(
    output: Output,
    row_key: Annotated[str, typer.Argument(help="A row, as the column row_key names it.")],
    to: Annotated[
        Path | None, typer.Option(help="The PNG to write; else named for the row, here.")
    ] = None,
) -> None:
    """Draw which visual tokens of a row's image were kept, and why."""
    with exit_codes():
        command_line.terminal().line(str(gc2ray.show(output, row_key, to)))


def verify(
    output: Output,
    deep: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--deep", help="Read every answer, not only the ends of files.")
    ] = False,
) -> None:
    """Check that an output holds every planned row exactly once."""
    with exit_codes():
        verdict = gc2ray.verify(output, deep=deep)
        command_line.terminal().verdict(verdict, output)
        raise typer.Exit(verdict.exit_code)


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
    with exit_codes():
        dataset = gc2ray.compact(
            output, destination, file_bytes=file_mb << 20, incomplete=incomplete
        )
        command_line.terminal().dataset(dataset, destination)


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
        command_line.ReferenceLists | None,
        typer.Option(help="A list of references is for any prompt, or has one for each."),
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Score answers against a column of right answers."""
    with exit_codes():
        metrics = tuple(metric or ())
        result = gc2ray.evaluate(*outputs, reference=reference, metrics=metrics, by=by, lists=lists)
        print_json(result.to_dict()) if as_json else command_line.terminal().evaluation(result)

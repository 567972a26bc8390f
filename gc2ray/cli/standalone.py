"""Commands that take neither a job nor an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import gc2ray
from gc2ray.api import command_line
from gc2ray.cli.endings import exit_codes, print_json
from gc2ray.cli.options import AsJson


def models(
    model_type: Annotated[
        str | None, typer.Argument(help="Only this one, as config.json has it.", show_default=False)
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """List supported models, or say why one is not."""
    with exit_codes():
        result = gc2ray.supported_models(model_type)
        print_json(result.to_dict()) if as_json else command_line.terminal().models(result)
        raise typer.Exit(0 if result.models else 1)


def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for its model, rows, job and answers.")
    ] = Path("demo-output"),
) -> None:
    """Run a whole job with a small trained model, and score it."""
    with exit_codes():
        from gc2ray.demo.demo import demo as run_demo

        raise typer.Exit(run_demo(output))

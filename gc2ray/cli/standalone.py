"""Commands that take neither a job nor an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gc2ray.cli.endings import exit_codes


def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for its model, rows, job and answers.")
    ] = Path("demo-output"),
) -> None:
    """Run a whole job with a small trained model, and score it."""
    with exit_codes():
        from gc2ray.demo.demo import demo as run_demo

        raise typer.Exit(run_demo(output))

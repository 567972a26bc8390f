"""The `gc2ray` command: what is common to all commands, and which there are.

Exit codes: 0 every planned row is committed, and not too many answers failed; 1 they did, or
something was given up; 2 the configuration cannot be used; 130 interrupted.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gc2ray import __version__
from gc2ray.api import command_line
from gc2ray.cli.jobs import check, estimate, run, submit, tune
from gc2ray.cli.outputs import compact, evaluate, report, retry, show, status, verify
from gc2ray.cli.standalone import demo, models

HELP = "Answer a Parquet of images and prompts with a compressed vision-language model on Ray."
COMMANDS = (
    run, submit, estimate, tune, status, retry, report, show, verify, compact, evaluate, check,
    models, demo,
)  # fmt: skip
"""In the order in which `gc2ray --help` lists them."""


def _version(show: bool | None) -> None:  # noqa: FBT001 - typer calls it so
    if show:
        typer.echo(f"gc2ray {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    _show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
    log: Annotated[
        command_line.LogForm,
        typer.Option(help="Lines on stderr: for people, or with ids for programs."),
    ] = command_line.LogForm.TEXT,
) -> None:
    command_line.set_up(log)
    context.obj = log
    # Ray workers started under `uv run` would rebuild the environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def _app() -> typer.Typer:
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help=HELP,
    )
    app.callback()(_root)
    for command in COMMANDS:
        app.command()(command)
    return app


app = _app()

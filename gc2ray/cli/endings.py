"""How a command ends: its exit code, and what it says where people and programs read it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gc2ray.api import command_line

log = logging.getLogger(__name__)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn every error into a line on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except (command_line.Stopped, KeyboardInterrupt):
        raise _ended(command_line.INTERRUPTED, 130) from None
    except Exception as error:
        explained = command_line.explain(error)
        if explained is None and command_line.writes_json():
            log.exception("unexpected: %s; this is a bug", type(error).__name__)
            raise typer.Exit(1) from None
        raise _ended(*explained or (command_line.unexpected(error), 1)) from None


def print_json(document: object) -> None:
    """Print a result as one JSON document."""
    typer.echo(json.dumps(document))


def _ended(line: str, code: int) -> typer.Exit:
    """Say how a command ends; in JSON where a program reads the lines."""
    if command_line.writes_json():
        log.error("%s", line)
    else:
        typer.echo(line, err=True)
    return typer.Exit(code)

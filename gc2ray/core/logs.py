"""Logging, set up by whoever owns the process: text for people, or a JSON object per line.

JSON lines carry the ids that they are given (`run`, `worker`) and those of single records, passed
as `extra` (`shard`, `worker`).

Not covered: where lines go from stderr; Ray collects those of its workers.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from pythonjsonlogger.json import JsonFormatter

TEXT = "%(levelname)s %(name)s: %(message)s"
JSON = "%(levelname)s %(name)s %(message)s"
_NAMES = {"levelname": "level", "name": "logger"}


class LogForm(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


def set_up(form: LogForm, **ids: str) -> None:
    """Log to stderr from here on, in place of what was set up before.

    Text starts at warnings; JSON, which is read by programs, tells of every shard.

    Args:
        form: How.
        ids: Of JSON lines, all of them.
    """
    handler = logging.StreamHandler()
    level = logging.WARNING
    handler.setFormatter(logging.Formatter(TEXT))
    if form is LogForm.JSON:
        handler.setFormatter(
            JsonFormatter(JSON, rename_fields=_NAMES, static_fields=ids, timestamp="time")
        )
        level = logging.INFO
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("gc2ray").setLevel(level)


def writes_json() -> bool:
    """Whether log lines are for programs here, as they were set up."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)

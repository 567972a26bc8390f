"""Sets up logging for a process: text for people, or a JSON object per line.

JSON lines carry the ids of the process (`run`, `worker`) and those of a single record, passed as
`extra` (`shard`, `worker`).

Not covered: what happens to lines after stderr; Ray collects those of its workers.
"""

from __future__ import annotations

import logging
from enum import StrEnum

from pythonjsonlogger.json import JsonFormatter

TEXT = "%(levelname)s %(name)s: %(message)s"
JSON = "%(levelname)s %(name)s %(message)s"
_NAMES = {"levelname": "level", "name": "logger"}


class LogForm(StrEnum):
    """The form of a log line."""

    TEXT = "text"
    JSON = "json"


def set_up(form: LogForm, **ids: str) -> None:
    """Log to stderr from now on, instead of any earlier setup.

    Text has warnings and errors only; JSON, which programs read, also has a line for every shard.

    Args:
        form: The form of a line.
        ids: Fields of every JSON line.
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
    """Whether logging is set up to write JSON."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)

"""The kinds of errors, each with an owner.

The answer owns a bad row (`BadRow`), the driver a bad shard (`ShardError`), the worker process a
dead device (`EngineDead`), and the user a bad configuration (`ConfigError`) or a storage that
refuses writes (`StorageRefused`). `GivenUp` is the driver's decision to stop, `Interrupted` the
user's. Any other exception is a bug and reported as one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum

ErrorName = tuple[str, str]
"""Module and name of a library's exception type."""
_LIBRARY_ERRORS: tuple[ErrorName, ...] = (
    ("aiohttp.client_exceptions", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("huggingface_hub.errors", "HTTPError"),
)
"""Errors that filesystems raise beside `OSError`: s3fs passes missing credentials on as botocore's,
and broken connections, as fsspec's web filesystem does, as aiohttp's; the hub's are those of its
HTTP library."""

RESUME_STORAGE = (
    "if access was denied, check your credentials; run the same command again to resume"
)


def storage_errors() -> tuple[type[Exception], ...]:
    """The exception types that filesystems raise, for an `except` clause.

    Call it where the error is caught, not before, see `loaded_errors`.
    """
    return (OSError, *loaded_errors(_LIBRARY_ERRORS))


def loaded_errors(names: Iterable[ErrorName]) -> tuple[type[Exception], ...]:
    """The exception types of those libraries that are imported.

    Nothing is imported for it, as these libraries take 0.2 s: an error of a library that was never
    imported cannot be raised.
    """
    kinds = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return tuple(kind for kind in kinds if kind is not None)


class Status(StrEnum):
    """What became of a prompt of a row; the value is what stands in the `status` column."""

    OK = "ok"
    BAD_IMAGE = "bad_image"
    BAD_PROMPT = "bad_prompt"
    TOO_LONG = "too_long"
    OUT_OF_MEMORY = "out_of_memory"
    KILLED_WORKER = "killed_worker"
    TIMEOUT = "timeout"
    FAILED = "failed"


def explain(error: Exception) -> tuple[str, int] | None:
    """What to tell a user about an error, and the exit code; None where the error is a bug."""
    match error:
        case ConfigError():
            return f"configuration: {error}", 2
        case GivenUp():
            return f"given up: {error}", 1
        case Interrupted():
            return f"interrupted: {error}; run the same command again to resume", 130
    if not isinstance(error, storage_errors()):
        return None
    text = " ".join(str(error).split())
    parts = [*getattr(error, "__notes__", ()), type(error).__name__, text]
    return f"storage: {': '.join(parts)}; {RESUME_STORAGE}", 1


def first_line(error: Exception) -> str:
    """What an exception says, as far as that fits into a message of ours; its kind if nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class ConfigError(Exception):
    """The configuration cannot be used; the message says which key, and what to do. Exit code 2."""


class BadRow(Exception):  # noqa: N818 - the name of the kind
    """One row cannot be answered; its answer carries this status and message."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    def __reduce__(self) -> tuple[type[BadRow], tuple[Status, str]]:
        return type(self), (self.status, self.message)


class ShardError(Exception):
    """A shard cannot be read or written as planned; it is retried, then given up."""


class UnwritableShard(ShardError):  # noqa: N818 - the name of the kind
    """A shard is answered, but its part cannot be written; answering it again would not help."""


class StorageRefused(Exception):  # noqa: N818 - the name of the kind
    """A storage takes nothing more, and waiting does not help: no shard would fare better."""


class EngineDead(Exception):  # noqa: N818 - the name of the kind
    """The engine or its device cannot continue; the process that holds it must end."""


class Interrupted(Exception):  # noqa: N818 - it is a wish, not a fault
    """The run stopped on request; the message says what is left to do. Exit code 130."""


class GivenUp(Exception):  # noqa: N818 - it is a decision, not a fault
    """The run stops before its end; the message says why. Exit code 1."""

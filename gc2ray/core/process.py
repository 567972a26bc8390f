"""Makes every process of gc2ray end with one line and an exit code of its own.

Signals to stop are handled before the libraries are imported. If the reader of the output goes
away, the work continues. An unexpected error is a bug: one line names it, and a file keeps its
traceback.

Not covered: SIGKILL, and libraries that end the process themselves; the meaning of errors
(`gc2ray.core.errors`).
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = "interrupted; run the same command again to resume"
_UNREAD = {errno.EPIPE, errno.EIO}
"""Errors of a pipe without a reader and of a closed terminal."""


class Stopped(BaseException):
    """A signal to stop, while there is nothing to finish.

    It is not a KeyboardInterrupt, which command-line libraries turn into their own exit code.
    """


def heard(number: signal.Signals) -> bool:
    """Whether to handle a signal: if the parent ignored it, as `nohup` does, it stays ignored."""
    return signal.getsignal(number) is not signal.SIG_IGN


def run_process(command: Callable[[], object]) -> None:
    """Run a command as the whole work of this process.

    Raises:
        SystemExit: Always; the exit code is the command's, 130 after a signal, 1 after a bug.
    """
    for number in filter(heard, STOP_SIGNALS):
        signal.signal(number, _stop)
    try:
        _outlive_readers()
        command()
    except (Stopped, KeyboardInterrupt, SystemExit) as ended:
        # Ray's own handler of SIGTERM exits with its number, in place of ours while Ray starts.
        if isinstance(ended, SystemExit) and ended.code != signal.SIGTERM:
            raise
        _ignore_signals()
        _print(INTERRUPTED)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the end of the process: it is reported
        _ignore_signals()
        _print(unexpected(error))
        sys.exit(1)
    finally:
        _ignore_signals()  # the exit code is settled
    sys.exit(0)


def unexpected(error: BaseException) -> str:
    """The line for an unexpected error, whose traceback is written to a file."""
    import tempfile
    import traceback

    text = " ".join(str(error).split())[:500]
    message = f"unexpected: {type(error).__name__}{f': {text}' if text else ''}; this is a bug"
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gc2ray-traceback-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(trace)
    except OSError:  # no space or no permission: then on stderr
        return f"{message}:\n{trace}"
    return f"{message}: please report it with its traceback, {file.name}"


def _stop(_number: int, _frame: object) -> None:
    raise Stopped


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _print(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")


class _Lasting(io.TextIOWrapper):
    """A stream that survives the loss of its reader, and characters that it cannot encode."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        """Discard further output, because its reader is gone.

        Raises:
            OSError: The error is another one, such as a full disk.
        """
        if error.errno not in _UNREAD:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _outlive_readers() -> None:
    """Make stdout and stderr survive a lost reader and characters that they cannot encode."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            lasting = _Lasting(
                stream.buffer, stream.encoding, errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, lasting)

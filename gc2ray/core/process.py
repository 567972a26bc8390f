"""How a process of gc2ray ends: with one line and an exit code of its own, whatever comes.

A signal to stop is heard from the first line on, libraries are imported behind it. Whoever reads
what is printed may go; the work goes on. What nobody has foreseen is a bug: one line names it, and
a file keeps the traceback.

Not covered: SIGKILL, and libraries that end the process themselves; what errors mean
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
INTERRUPTED = "interrupted; run the same command again to go on"
_UNREAD = {errno.EPIPE, errno.EIO}
"""A pipe that nobody reads, a terminal that is closed."""


class Stopped(BaseException):
    """A signal to stop, while nobody had anything to end well.

    Not KeyboardInterrupt, which libraries of command lines turn into an exit code of theirs.
    """


def heard(number: signal.Signals) -> bool:
    """Whether a signal is to be heard: who ignored it for us, as `nohup` does, had a reason."""
    return signal.getsignal(number) is not signal.SIG_IGN


def run_process(command: Callable[[], object]) -> None:
    """Run a command that ends with SystemExit, as all that this process does.

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
        _deafen()
        _tell(INTERRUPTED)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the end of the process: it is told
        _deafen()
        _tell(unexpected(error))
        sys.exit(1)
    finally:
        _deafen()  # how it ends is settled
    sys.exit(0)


def unexpected(error: BaseException) -> str:
    """What to say of an error that nobody has foreseen; its traceback is in a file."""
    import tempfile
    import traceback

    said = " ".join(str(error).split())[:500]
    told = f"unexpected: {type(error).__name__}{f': {said}' if said else ''}; this is a bug"
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gc2ray-traceback-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            file.write(trace)
    except OSError:  # no room, no permission: better here than nowhere
        return f"{told}:\n{trace}"
    return f"{told}: please report it with its traceback, {file.name}"


def _stop(_number: int, _frame: object) -> None:
    raise Stopped


def _deafen() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _tell(line: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"{line}\n")


class _Lasting(io.TextIOWrapper):
    """A stream that takes what nobody reads any more, and characters that it cannot show."""

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
        """Nobody reads: what is still to be written goes nowhere.

        Raises:
            OSError: It is something else, as a full disk.
        """
        if error.errno not in _UNREAD:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _outlive_readers() -> None:
    """Let what is printed be read by nobody, or on a terminal that knows few characters."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.flush()
            lasting = _Lasting(
                stream.buffer, stream.encoding, errors, line_buffering=stream.line_buffering
            )
            setattr(sys, name, lasting)

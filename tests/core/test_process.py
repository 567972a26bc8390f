"""Every end of a command is one line and an exit code of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, RaySystemError

from gc2ray.core.errors import ConfigError, GivenUp
from gc2ray.core.process import INTERRUPTED, STOP_SIGNALS
from gc2ray.runner.ray_pool import _cause
from gc2ray.runner.ray_session import connected
from tests.support.commands import ROOT, run_command
from tests.support.outputs import first_plan, write_round
from tests.support.rows import job_data


def hear_all() -> None:
    """As a process of a terminal does: one in the background of a script does not hear SIGINT."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start(*words: object, path: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gc2ray", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{path}:{ROOT}", **environment},
        preexec_fn=hear_all,
    )


# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_libraries_are_imported(tmp_path: Path, number: signal.Signals) -> None:
    """They take a second; here one takes a minute."""
    slow = (
        f"import time, pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "typer.py").write_text(slow)
    process, deadline = start("--version", path=tmp_path), time.monotonic() + 60
    while not (tmp_path / "mark").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=100) == ("", f"{INTERRUPTED}\n")
    assert process.returncode == 130


def test_rays_own_handler_of_sigterm_is_an_interruption() -> None:
    """It ends the process with 15, if a second signal comes before ours is back in place."""
    script = (
        "import sys; from gc2ray.core.process import run_process; run_process(lambda: sys.exit(15))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, f"{INTERRUPTED}\n")


@pytest.mark.parametrize("moment", ["before", "within", "behind"])
def test_a_signal_at_every_moment_of_a_command(tmp_path: Path, moment: str) -> None:
    """Before anything of ours, while it reads, and when its exit code is settled."""
    script = """
import os, signal, sys
from gc2ray.core import process as ending
from gc2ray.output import verify
def hit(*_, **__): os.kill(os.getpid(), signal.SIGTERM)
def command():
    from gc2ray.cli.app import app
    if sys.argv[1] == "before": hit()
    if sys.argv[1] == "within": verify.verify = hit
    sys.argv[:] = ["gc2ray", "verify", sys.argv[2]]
    try: app()
    finally: codes.append(1)
codes = []
moment = sys.argv[1]
import atexit
if moment == "behind": atexit.register(hit)
ending.run_process(command)
"""
    write_round(tmp_path, 0, first_plan())
    done = subprocess.run(
        [sys.executable, "-c", script, moment, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    expected = (0, "") if moment == "behind" else (130, f"{INTERRUPTED}\n")
    assert (done.returncode, done.stderr) == expected


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As by `nohup`."""
    script = """
import os, signal
from gc2ray.core import process as ending
from gc2ray.runner import run
def command():
    os.kill(os.getpid(), signal.SIGHUP)
    with run.stopping() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        print(stop.is_set())
signal.signal(signal.SIGHUP, signal.SIG_IGN)
ending.run_process(command)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


# --- Ray ---------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def init(**_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does, with one of its own
        raise error

    monkeypatch.setattr(ray, "init", init)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("error", "reported", "advice"),
    [
        (
            RuntimeError(
                "Version mismatch: cluster:\n    Ray: 2.60.0\nThis process:\n    Ray: 9.9.9"
            ),
            "Version mismatch: cluster: Ray: 2.60.0 This process: Ray: 9.9.9; ",
            "install the cluster's versions here",
        ),
        (Exception("The current node timed out"), "node timed out; ", "/ray"),
        (OSError("AF_UNIX path length cannot exceed 107"), "107; ", "(120 characters): set TMPDIR"),
        (PermissionError(13, "token"), "token; ", "RAY_AUTH_MODE=disabled"),
        (MemoryError(), "MemoryError; ", "/ray"),
    ],
    ids=["version", "bare", "path", "token", "memory"],
)
def test_a_failed_start_of_ray_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reported: str, advice: str
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "t" * 119)
    failing(monkeypatch, error)
    with pytest.raises(ConfigError) as caught, connected(None):
        pass
    message = str(caught.value)
    assert message.startswith("cannot start Ray on this machine: ")
    assert reported in message
    assert advice in message
    assert "\n" not in message
    assert not ("AF_UNIX" in message and "RAY_AUTH" in message)


@pytest.mark.usefixtures("no_ray")
def test_a_signal_while_ray_starts_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has a handler of its own then, which ends the process with 15."""
    failing(monkeypatch, SystemExit(15))
    with pytest.raises(KeyboardInterrupt), connected(None):
        pass


@pytest.mark.usefixtures("no_ray")
def test_a_ray_that_fails_later_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    reported = r"^Ray failed: RaySystemError: .*the GCS is gone.*; run the same command"
    with pytest.raises(GivenUp, match=reported), connected(None):
        raise RaySystemError("the GCS is gone")


CREATION = """\
The actor died because of an error raised in its creation task, ray::_Actor.__init__() (pid=1)
  File "/x/gc2ray/ray_pool.py", line 380, in __init__
    self._worker = make_worker(*arguments)
                   ^^^^^^^^^^^^^^^^^^^^^^^
  File "/x/gc2ray/worker.py", line 142, in __init__
    self.run = job.recipe.fingerprint()
UnicodeEncodeError: 'utf-8' codec can't encode characters in position 3-4:
 surrogates not allowed
"""


def test_a_worker_that_cannot_be_made_is_reported_by_the_end_of_its_traceback() -> None:
    error = ActorDiedError()
    error.error_msg = CREATION
    assert str(error) == CREATION
    assert _cause(error) == (
        "UnicodeEncodeError: 'utf-8' codec can't encode characters in position 3-4: "
        "surrogates not allowed"
    )


@pytest.mark.parametrize(
    ("code", "expected"), [(0, 0), (1, 1), (2, 2), (130, 130), (-9, 1), (7, 1)]
)
def test_a_followed_job_ends_with_a_documented_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, expected: int
) -> None:
    class Server:
        def __init__(self, address: str) -> None: ...

        def submit(self, *_: object) -> str:
            return "job-1"

        def follow(self, *_: object) -> int:
            return code

    monkeypatch.setattr("gc2ray.runner.submit.JobServer", Server)
    job = tmp_path / "job.json"
    job.write_text(json.dumps(job_data("hub/model", "/data/in", "s3://bucket/out")))
    result = run_command("submit", job, "--follow")
    assert result.exit_code == expected
    reported = f"given up: job-1 ended with exit code {code}; submit it again to resume\n"
    assert result.stderr == ("" if code == expected else reported)


# --- what nobody has foreseen ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (ValueError("half\nof it"), "ValueError: half of it"),
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bug_is_named_and_its_traceback_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, reported: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("gc2ray.output.verify.verify", broken)
    result = run_command("verify", tmp_path)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"unexpected: {reported}; this is a bug: please report it")
    trace = Path(line.rpartition(", ")[2]).read_text()
    assert "in broken" in trace
    assert trace.startswith("Traceback")
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    result = run_command("verify", tmp_path)
    assert result.exit_code == 1
    assert "in broken" in result.stderr, "no room for a file: it is reported all the same"


def test_a_bug_is_a_line_of_json_for_programs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gc2ray.output.verify.verify", lambda *_, **__: 1 / 0)
    result = run_command("--log", "json", "verify", tmp_path)
    assert result.exit_code == 1
    line = json.loads((result.stderr + capfd.readouterr().err).splitlines()[-1])
    assert line["message"] == "unexpected: ZeroDivisionError; this is a bug"
    assert "ZeroDivisionError: division by zero" in line["exc_info"]


def test_a_library_that_is_missing_is_reported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('no typer here')\n")
    process = start("--version", path=tmp_path)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert stderr.startswith("unexpected: ImportError: no typer here; this is a bug: please report")
    assert len(stderr.splitlines()) == 1
    Path(stderr.strip().rpartition(", ")[2]).unlink()


# --- who reads it ------------------------------------------------------------------------------


def test_a_closed_pipe_is_not_an_error(tmp_path: Path) -> None:
    write_round(tmp_path, 0, first_plan())
    process = start("verify", tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 0


def test_status_is_printed_in_ascii(tmp_path: Path) -> None:
    """Nothing is cut, so that times can be read; truncated records are reported."""
    write_round(tmp_path, 0, first_plan())
    time_ = "2026-11-29T19:04:05.123456+00:00"
    record = {
        "uuid": "w", "node": "a-node-with-a-long-name-of-its-own.example.com", "pid": 4711,
        "model_digest": "d", "model_shape": None, "gpus": None, "cpus": 1.0, "loaded": None,
    }  # fmt: skip
    (tmp_path / "workers").mkdir()
    good = json.dumps({**record, "started": time_, "last_seen": time_, "device": "[cpu] \u20ac"})
    for name, text in {"a": good, "b": good[:30], "c": "", "d": "[1]", "e": "\udce9"}.items():
        path = tmp_path / f"workers/{name}.json"
        path.write_bytes(text.encode(errors="surrogateescape"))
    process = start("status", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0", COLUMNS="60")
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    shown = re.sub(r"[^\w.:\[\] -]+", "", stdout)
    for text in ("2026-11-29", "19:04:05", "4711", "[cpu]"):
        assert text in shown, stdout
    assert stdout.count("?") == 1, "nothing but the euro cannot be shown"
    warned = [line for line in stderr.splitlines() if "is not a record that gc2ray wrote" in line]
    assert len(warned) == 4


def test_a_truncated_dead_letter_is_reported(tmp_path: Path) -> None:
    plan = first_plan()
    write_round(tmp_path, 0, plan, lambda source, row: None if row == 0 else ["ok"])
    for letter, text in zip(sorted((tmp_path / "dead").iterdir()), ("", "[1]"), strict=True):
        letter.write_text(text)
    result = run_command("status", tmp_path)
    assert result.exit_code == 1
    assert result.stdout.count("is not a dead letter that gc2ray wrote, or is incomplete") == 2


def test_brackets_in_a_path_are_shown(tmp_path: Path) -> None:
    output = tmp_path / "run [v2]"
    write_round(output, 0, first_plan())
    for command in ("status", "verify"):
        assert "run [v2]" in run_command(command, output).stdout


@pytest.mark.parametrize(
    "words", [["compact", "OUT", "s3:/b/x"], ["report", "OUT", "--to", "$X/r"]]
)
def test_a_mistyped_destination_is_refused(tmp_path: Path, words: list[str]) -> None:
    write_round(tmp_path, 0, first_plan())
    result = run_command(*(str(tmp_path) if word == "OUT" else word for word in words))
    assert result.exit_code == 2
    assert "did you mean 's3://b/x'?" in result.stderr or "has a shell variable" in result.stderr

"""Log lines: text for people, JSON with ids for programs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from gc2ray.core.logs import LogForm, set_up

log = logging.getLogger("gc2ray.somewhere")


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers = root.handlers[:]
    yield
    root.handlers[:] = handlers


def test_text_logs_show_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogForm.TEXT)
    log.info("not shown")
    log.warning("a shard is lost", extra={"shard": "abc"})
    assert capsys.readouterr().err == "WARNING gc2ray.somewhere: a shard is lost\n"


def test_json_carries_ids_and_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogForm.JSON, run="r")
    set_up(LogForm.JSON, run="r", worker="w")
    log.info("a shard is done", extra={"shard": "abc"})
    logging.getLogger("another").info("not ours, not shown")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert datetime.fromisoformat(record.pop("time")).utcoffset() is not None
    assert record == {
        "level": "INFO",
        "logger": "gc2ray.somewhere",
        "message": "a shard is done",
        "run": "r",
        "worker": "w",
        "shard": "abc",
    }


def test_a_traceback_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up(LogForm.JSON)
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("it broke")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: bad" in json.loads(line)["exc_info"]

"""What the driver and the workers tell each other: counters that add up exactly."""

from __future__ import annotations

from dataclasses import fields, replace

from gc2ray.core.errors import Status
from gc2ray.core.records import Request
from gc2ray.output.planner import FIRST_ERRORS
from gc2ray.runner.messages import Progress
from tests.support.fakes import echo

REQUEST = Request("a.parquet#0#0", "a.parquet", 0, images=(), prompts=("?",))
NAMES = [field.name for field in fields(Progress)]


def progress(number: int) -> Progress:
    """Every counter has a value of its own."""
    counts = {name: number * 10**place for place, name in enumerate(NAMES[:-1])}
    return Progress(**counts, errors=(f"error {number}",))


def test_since_inverts_addition() -> None:
    for counter in NAMES:
        assert getattr(progress(2) + progress(3), counter) == (
            ("error 2", "error 3") if counter == "errors" else getattr(progress(5), counter)
        )
    assert (progress(2) + progress(3)).since(progress(2)) == progress(3)


def test_only_the_first_errors_are_kept() -> None:
    total = sum((progress(number) for number in range(10)), Progress())
    assert total.errors == tuple(f"error {number}" for number in range(FIRST_ERRORS))


def test_an_answer_counts_once_and_its_row_with_the_first_prompt() -> None:
    answer = replace(echo(REQUEST), visual_tokens_full=9, visual_tokens_kept=4)
    assert Progress.from_answer(answer) == Progress(
        rows=1, answers=1, visual_tokens_full=9, visual_tokens_kept=4
    )
    second = replace(REQUEST, row_key="a.parquet#0#1", prompt_index=1)
    failed = echo(second, status=Status.FAILED, answer=None, error="no answer")
    assert Progress.from_answer(failed) == Progress(
        answers=1, bad_answers=1, errors=("a.parquet#0#1: failed: no answer",)
    )

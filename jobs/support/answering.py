"""Answers of an engine outside a job: all of them in the order of the rows, or an error."""

from __future__ import annotations

from collections.abc import Sequence

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.engine.engine import Engine


def _place(answer: Answer) -> tuple[int, int]:
    return answer.request.row, answer.request.prompt_index


def answers_in_order(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answers in the order of the rows.

    Raises:
        RuntimeError: A row was not answered.
    """
    answers = sorted(engine.stream(requests), key=_place)
    bad = [answer.error for answer in answers if answer.status != Status.OK]
    if bad or len(answers) != len(requests):
        raise RuntimeError(f"{len(answers)} of {len(requests)} rows answered; errors: {bad[:3]}")
    return answers

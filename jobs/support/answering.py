"""Answers of an engine outside a job: all of them in the order of the rows, or an error."""

from __future__ import annotations

from collections.abc import Sequence

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.engine import local_model
from gc2ray.engine.engine import Engine


def answers_in_order(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Answers in the order of the requests.

    Raises:
        RuntimeError: A row was not answered.
    """
    answers = local_model.answers_in_order(engine, requests)
    bad = [answer.error for answer in answers if answer.status != Status.OK]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(requests)} rows failed; errors: {bad[:3]}")
    return answers

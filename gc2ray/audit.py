"""`Audited`: an engine that answers some rows twice, once as configured and once uncompressed.

Which rows, depends on their key alone: the same in every run, on every worker, after every retry.
Both answers are asked of the same engine, one right behind the other, so that they are decoded
under the same conditions; images of such rows are encoded twice. What comes out is one answer: the
configured one, with what the other said and how far they agree. The time of the second answer is
not in its stages; it is counted apart.

Not covered: answering anew what disagrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from gc2ray.cost import ModelShape
from gc2ray.errors import Status
from gc2ray.quality import similarity
from gc2ray.records import UNCOMPRESSED, Answer, Audit, Request
from gc2ray.stats import RunStats

_WHOLE = 1 << 64


class Answering(Protocol):
    """What is needed of an engine."""

    @property
    def device(self) -> str:
        """What the device calls itself."""

    @property
    def model_digest(self) -> str:
        """Which model it is; see `gc2ray.staging.digest`."""

    @property
    def model_shape(self) -> ModelShape | None:
        """Its sizes, if it has any."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """As `gc2ray.engine.Engine.stream`."""

    def forget(self) -> None:
        """As `gc2ray.engine.Engine.forget`."""

    def totals(self) -> RunStats:
        """As `gc2ray.engine.Engine.totals`."""


def is_audited(row_key: str, share: float) -> bool:
    """Whether a row is among the share that is audited; a larger share holds a smaller one."""
    digest = hashlib.sha256(f"audit/{row_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * _WHOLE


@dataclass
class Audited:
    """An engine with a second look; `Answering` like the one within.

    Attributes:
        engine: Which answers.
        share: Of the rows are audited, in (0, 1].
    """

    engine: Answering
    share: float

    @property
    def device(self) -> str:
        """The engine's."""
        return self.engine.device

    @property
    def model_digest(self) -> str:
        """The engine's."""
        return self.engine.model_digest

    @property
    def model_shape(self) -> ModelShape | None:
        """The engine's."""
        return self.engine.model_shape

    def forget(self) -> None:
        """As the engine."""
        self.engine.forget()

    def totals(self) -> RunStats:
        """As the engine."""
        return self.engine.totals()

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer for each request; of two to the same the first waits for the second."""
        waiting: dict[str, Answer] = {}
        for answer in self.engine.stream(self._asked(requests)):
            if not answer.request.is_audited:
                yield answer
                continue
            key = answer.request.row_key
            other = waiting.pop(key, None)
            if other is None:
                waiting[key] = answer
            elif answer.request.way == UNCOMPRESSED:
                yield _joined(other, answer)
            else:
                yield _joined(answer, other)

    def _asked(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Requests, and behind each that is audited its uncompressed double."""
        for request in requests:
            if request.fault is None and is_audited(request.row_key, self.share):
                audited = replace(request, is_audited=True)
                yield audited
                yield replace(audited, way=UNCOMPRESSED)
            else:
                yield request


def _joined(answer: Answer, uncompressed: Answer) -> Answer:
    """The configured answer, with what the uncompressed one says of it."""
    agreement = None
    if answer.status == uncompressed.status == Status.OK:
        agreement = similarity(answer.answer or "", uncompressed.answer or "")
    elif Status.OK in (answer.status, uncompressed.status):
        agreement = 0.0
    audit = Audit(uncompressed.answer, 1.0, agreement, uncompressed.stage_ns)
    return replace(answer, audit=audit, retry=answer.retry or uncompressed.retry)

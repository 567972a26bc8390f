"""`Audited`: an engine that answers some rows twice, once as configured and once uncompressed.

Which rows, depends on their key alone: the same in every run, on every worker, after every retry.
Both answers are asked of the same engine, one right behind the other, so that they are decoded
under the same conditions; images of such rows are encoded twice. What comes out is one answer: the
configured one, with what the other said and how far they agree.

A row whose answers disagree may be answered anew with more visual tokens, rung by rung, until one
agrees. What is measured stays what it was, the agreement of the configured answer.

The time of all answers but the one that comes out is not in its stages; it is counted apart.

Not covered: rows that are not audited, of which nobody knows whether they disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gc2ray.core.errors import Status
from gc2ray.core.metrics.scores import similarity
from gc2ray.core.records import UNCOMPRESSED, Answer, Audit, Escalation, Request
from gc2ray.core.stats import RunStats, merged
from gc2ray.models.shape import ModelShape

_WHOLE = 1 << 64


class Answering(Protocol):
    """What a worker needs of an engine."""

    @property
    def device(self) -> str:
        """What the device calls itself."""

    @property
    def model_digest(self) -> str:
        """Which model it is; see `gc2ray.models.checkpoint.fetch.digest`."""

    @property
    def model_shape(self) -> ModelShape | None:
        """Its sizes, if it has any."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """As `gc2ray.engine.engine.Engine.stream`."""

    def clear_cache(self) -> None:
        """As `gc2ray.engine.engine.Engine.clear_cache`."""

    def totals(self) -> RunStats:
        """As `gc2ray.engine.engine.Engine.totals`."""


class Askable(Answering, Protocol):
    """What is needed of one to audit it."""

    def requeue(self, request: Request) -> None:
        """As `gc2ray.engine.engine.Engine.requeue`."""


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
        rungs: Ways in which those that disagree are answered anew, one after the other.
        min_agreement: Answers that are less alike disagree.
    """

    engine: Askable
    share: float
    rungs: Sequence[str] = ()
    min_agreement: float = 1.0

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

    def clear_cache(self) -> None:
        """As the engine."""
        self.engine.clear_cache()

    def totals(self) -> RunStats:
        """As the engine."""
        return self.engine.totals()

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer for each request; of several to the same the last brings them all."""
        looks: dict[str, _AuditedRow] = {}
        for answer in self.engine.stream(self._asked(requests, looks)):
            if not answer.request.is_audited:
                yield answer
                continue
            key = answer.request.row_key
            look = looks[key]
            look.take(answer)
            rung = look.next_rung(self.rungs, self.min_agreement)
            if rung is not None:
                self.engine.requeue(replace(look.request, policy=rung))
            elif look.is_whole:
                yield looks.pop(key).joined()

    def _asked(
        self, requests: Iterable[Request], looks: dict[str, _AuditedRow]
    ) -> Iterator[Request]:
        """Requests, and behind each that is audited its uncompressed double."""
        for request in requests:
            if request.fault is None and is_audited(request.row_key, self.share):
                audited = replace(request, is_audited=True)
                looks[request.row_key] = _AuditedRow(audited)
                yield audited
                yield replace(audited, policy=UNCOMPRESSED)
            else:
                yield request


@dataclass(eq=False)
class _AuditedRow:
    """An audited row on its way.

    Attributes:
        request: With its image: it may be asked again.
        uncompressed: The uncompressed answer.
        tries: The others: the configured one, then those of the rungs.
    """

    request: Request
    uncompressed: Answer | None = None
    tries: list[Answer] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return self.uncompressed is not None and bool(self.tries)

    def take(self, answer: Answer) -> None:
        if answer.request.policy == UNCOMPRESSED:
            self.uncompressed = answer
        else:
            self.tries.append(answer)

    def next_rung(self, rungs: Sequence[str], min_agreement: float) -> str | None:
        """What to ask now; nothing where there is nothing to agree with, or storage failed."""
        whole = self.uncompressed
        if whole is None or not self.tries or len(self.tries) > len(rungs):
            return None
        if whole.status != Status.OK or self.tries[-1].retry:
            return None
        agreement = _agreement(self.tries[-1], whole) or 0.0
        return rungs[len(self.tries) - 1] if agreement < min_agreement else None

    def joined(self) -> Answer:
        """The last of the tries that is an answer, with what the uncompressed one says of them."""
        whole, (first, *anew) = self.uncompressed, self.tries
        if whole is None:
            raise ValueError(f"{self.request.row_key} was not answered uncompressed")
        chosen = next((a for a in reversed(self.tries) if a.status == Status.OK), first)
        escalation = None
        if anew:
            replaced = [answer.stage_ns for answer in self.tries if answer is not chosen]
            agreement = _agreement(chosen, whole) or 0.0
            escalation = Escalation(first.answer, agreement, merged(replaced))
        audit = Audit(
            answer=whole.answer,
            agreement=_agreement(first, whole),
            stage_ns=whole.stage_ns,
            own_ns=first.stage_ns,
            escalation=escalation,
        )
        failed = whole.retry or any(answer.retry for answer in self.tries)
        return replace(chosen, audit=audit, retry=failed)


def _agreement(answer: Answer, uncompressed: Answer) -> float | None:
    if uncompressed.status != Status.OK:
        return None  # there is nothing to agree with
    if answer.status != Status.OK:
        return 0.0
    return similarity(answer.answer or "", uncompressed.answer or "")

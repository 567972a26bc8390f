"""`AuditedEngine`: answers some rows twice, once as configured and once uncompressed.

A row's key alone decides whether it is audited, so the same rows are audited in every run, on every
worker and after every retry. The same engine answers both requests, one right after the other, so
that they are decoded under the same conditions; images of audited rows are encoded twice. The
result is one answer: the configured one, with the uncompressed text and the similarity of the two.

A row whose answers disagree may be answered again with more visual tokens, escalating step by step
until an answer agrees. The similarity that is reported stays that of the configured answer.

The time of the other answers is not in the stages of the resulting answer; it is counted apart.

Not covered: whether answers of rows that are not audited disagree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gc2ray.core.errors import Status
from gc2ray.core.metrics.scores import similarity
from gc2ray.core.records import UNCOMPRESSED, Answer, Audit, Escalation, Request
from gc2ray.core.stats import RunStats, merged
from gc2ray.engine.answering import RequeuingEngine
from gc2ray.models.shape import ModelShape

_DIGESTS = 1 << 64


def is_audited(row_key: str, share: float) -> bool:
    """Whether a row is among the share that is audited; a larger share includes a smaller one."""
    digest = hashlib.sha256(f"audit/{row_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * _DIGESTS


@dataclass
class AuditedEngine:
    """An engine that audits the answers of another one.

    Attributes:
        engine: The engine that answers.
        share: Share of the rows that is audited, in (0, 1].
        escalation_policies: Names of the policies with which rows that disagree are answered again,
            one after the other.
        min_similarity: Answers that are less similar than this disagree.
    """

    engine: RequeuingEngine
    share: float
    escalation_policies: Sequence[str] = ()
    min_similarity: float = 1.0

    @property
    def device(self) -> str:
        """Name of the engine's device."""
        return self.engine.device

    @property
    def model_digest(self) -> str:
        """Digest of the engine's model."""
        return self.engine.model_digest

    @property
    def model_shape(self) -> ModelShape | None:
        """Sizes of the engine's model."""
        return self.engine.model_shape

    def clear_cache(self) -> None:
        """Clear the engine's caches."""
        self.engine.clear_cache()

    def totals(self) -> RunStats:
        """The engine's totals."""
        return self.engine.totals()

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """One answer for each request; that of an audited row comes once all of its answers did."""
        audited: dict[str, _AuditedRow] = {}
        for answer in self.engine.stream(self._doubled(requests, audited)):
            if not answer.request.is_audited:
                yield answer
                continue
            key = answer.request.row_key
            row = audited[key]
            row.add(answer)
            policy = row.next_policy(self.escalation_policies, self.min_similarity)
            if policy is not None:
                self.engine.requeue(replace(row.request, policy=policy))
            elif row.is_complete:
                yield audited.pop(key).joined()

    def _doubled(
        self, requests: Iterable[Request], audited: dict[str, _AuditedRow]
    ) -> Iterator[Request]:
        """The requests; each that is audited is followed by the same one, uncompressed."""
        for request in requests:
            if request.fault is None and is_audited(request.row_key, self.share):
                configured = replace(request, is_audited=True)
                audited[request.row_key] = _AuditedRow(configured)
                yield configured
                yield replace(configured, policy=UNCOMPRESSED)
            else:
                yield request


@dataclass(eq=False)
class _AuditedRow:
    """The answers to an audited row so far.

    Attributes:
        request: The request with its image, as it may be repeated.
        uncompressed: The uncompressed answer.
        compressed: The configured answer, then those of its escalation.
    """

    request: Request
    uncompressed: Answer | None = None
    compressed: list[Answer] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether both kinds of answers are there."""
        return self.uncompressed is not None and bool(self.compressed)

    def add(self, answer: Answer) -> None:
        """Add an answer of the engine."""
        if answer.request.policy == UNCOMPRESSED:
            self.uncompressed = answer
        else:
            self.compressed.append(answer)

    def next_policy(self, policies: Sequence[str], min_similarity: float) -> str | None:
        """The policy to answer with next; None where answers agree or cannot be compared."""
        reference = self.uncompressed
        if reference is None or not self.compressed or len(self.compressed) > len(policies):
            return None
        if reference.status != Status.OK or self.compressed[-1].is_retryable:
            return None
        reached = _similarity(self.compressed[-1], reference) or 0.0
        return policies[len(self.compressed) - 1] if reached < min_similarity else None

    def joined(self) -> Answer:
        """The last compressed answer without an error, with the results of its audit."""
        reference, (first, *escalated) = self.uncompressed, self.compressed
        if reference is None:
            raise ValueError(f"{self.request.row_key} was not answered uncompressed")
        chosen = next((a for a in reversed(self.compressed) if a.status == Status.OK), first)
        escalation = None
        if escalated:
            replaced = [answer.stage_ns for answer in self.compressed if answer is not chosen]
            final = _similarity(chosen, reference) or 0.0
            escalation = Escalation(first.answer, final, merged(replaced))
        audit = Audit(
            answer=reference.answer,
            similarity=_similarity(first, reference),
            stage_ns=reference.stage_ns,
            own_ns=first.stage_ns,
            escalation=escalation,
        )
        failed = reference.is_retryable or any(answer.is_retryable for answer in self.compressed)
        return replace(chosen, audit=audit, is_retryable=failed)


def _similarity(answer: Answer, uncompressed: Answer) -> float | None:
    if uncompressed.status != Status.OK:
        return None  # there is nothing to compare with
    if answer.status != Status.OK:
        return 0.0
    return similarity(answer.answer or "", uncompressed.answer or "")

"""`AnsweringEngine`: the part of an engine that workers and measurements use.

`gc2ray.engine.engine.Engine` is one, and so is `gc2ray.engine.audit.AuditedEngine` around it; tests
have others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from gc2ray.core.records import Answer, Request
from gc2ray.core.stats import RunStats
from gc2ray.models.shape import ModelShape


class Answering(Protocol):
    """Answers a stream of requests."""

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """See `gc2ray.engine.engine.Engine.stream`."""

    def clear_cache(self) -> None:
        """See `gc2ray.engine.engine.Engine.clear_cache`."""


class AnsweringEngine(Answering, Protocol):
    """An engine as a worker uses it."""

    @property
    def device(self) -> str:
        """The device's own name."""

    @property
    def model_digest(self) -> str:
        """Digest of the model; see `gc2ray.models.checkpoint.fetch.model_digest`."""

    @property
    def model_shape(self) -> ModelShape | None:
        """The model's sizes, if it has any."""

    def totals(self) -> RunStats:
        """See `gc2ray.engine.engine.Engine.totals`."""


class RequeuingEngine(AnsweringEngine, Protocol):
    """An engine that takes more requests between two answers of a stream."""

    def requeue(self, request: Request) -> None:
        """See `gc2ray.engine.engine.Engine.requeue`."""

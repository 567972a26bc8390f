"""`RequestState`: a request inside an engine, and `run_isolated`, which contains its failures.

Whatever one row can cause is noted in it, and no other row is the worse for it: what fails for
several is tried again on halves, until it belongs to one. A device that is lost belongs to none.

Not covered: rows that kill the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from gc2ray.core.errors import BadRow, EngineDead, ShardError, Status
from gc2ray.core.records import Request
from gc2ray.core.stats import apportion
from gc2ray.engine.image_cache import CachedImage
from gc2ray.models.base import Prompt


class FailedCall(Protocol):
    """A row or a picture: what can be blamed.

    Attributes:
        trouble: Why it cannot be answered, or used.
        retry: Another time it may.
        oom_splits: Times that memory was short for it and others, which were halved.
    """

    trouble: BadRow | None
    retry: bool
    oom_splits: int


U = TypeVar("U", bound=FailedCall)


@dataclass(eq=False)
class RequestState:
    """A request on its way.

    Attributes:
        request: Without its images once they are read.
        picture: What becomes of its image.
        shares: Another row brought that picture.
        token_ids: Of its chat prompt, with the image's placeholder.
        prompt: What the language model is to read, until the decoder has it.
        trouble: Why it cannot be answered.
        retry: The trouble may pass: its shard is to be tried again.
        oom_splits: Times that memory was short for it and others before the decoder had it.
        stage_ns: Time by stage so far.
    """

    request: Request
    cached_image: CachedImage | None = None
    shares: bool = False
    token_ids: list[int] = field(default_factory=list)
    prompt: Prompt | None = None
    trouble: BadRow | None = None
    retry: bool = False
    oom_splits: int = 0
    stage_ns: dict[str, int] = field(default_factory=dict)


def views_of(rows: Sequence[RequestState]) -> int:
    """Views that rows bring; one that brings none counts as one, so that batches of them end too.

    Rows that show the same picture bring it once, but are counted each: batches stay bounded.
    """
    return sum(max(row.cached_image.views if row.cached_image else 0, 1) for row in rows)


def share_time(
    rows: Sequence[RequestState], stage: str, total_ns: int, weights: Sequence[int]
) -> None:
    """Put a stage's time on rows, by weight."""
    for row, share in zip(rows, apportion(total_ns, weights), strict=True):
        row.stage_ns[stage] = share


def run_isolated(things: Sequence[U], work: Callable[[Sequence[U]], None]) -> None:
    """The row border: do the work, on halves where it fails, and blame the last one.

    Raises:
        EngineDead: The device is lost.
    """
    if not things:
        return
    try:
        work(things)
    except Exception as error:  # noqa: BLE001 - whatever one row can cause belongs to that row
        trouble, retry = trouble_of(error), isinstance(error, ShardError)
    else:
        return
    if len(things) == 1:
        things[0].trouble, things[0].retry = trouble, retry
        return
    for thing in things if trouble.status == Status.OUT_OF_MEMORY else ():
        thing.oom_splits += 1
    half = len(things) // 2
    run_isolated(things[:half], work)
    run_isolated(things[half:], work)


def trouble_of(error: Exception) -> BadRow:
    """What an exception means for the row that caused it.

    Raises:
        EngineDead: It means the device.
    """
    if isinstance(error, BadRow):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return BadRow(Status.OUT_OF_MEMORY, "the device has not enough memory for this row alone")
    if isinstance(error, torch.AcceleratorError):
        raise lost(error) from error
    return BadRow(Status.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")


def lost(error: torch.AcceleratorError) -> EngineDead:
    """What to raise when the device is lost."""
    return EngineDead(f"the device is lost: {error}")

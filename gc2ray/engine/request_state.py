"""`RequestState`: a request inside an engine, and `run_isolated`, which contains its failures.

A failure that one row causes is recorded in that row and does not affect the others: work that
fails for several rows is tried again on halves of them, down to a single row. A lost device is no
row's failure.

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


class CanFail(Protocol):
    """A row or an image, which records its own failure.

    Attributes:
        failure: Why it cannot be answered or used.
        is_retryable: Whether the failure may pass.
        oom_splits: How often a batch with it ran out of memory and was split in half.
    """

    failure: BadRow | None
    is_retryable: bool
    oom_splits: int


U = TypeVar("U", bound=CanFail)


@dataclass(eq=False)
class RequestState:
    """A request and what the engine has made of it so far.

    Attributes:
        request: The request, without its images once they are read.
        cached_images: Its images, which other rows may share.
        encoded: Of each image, whether it was encoded for this row, and not for another one.
        token_ids: Token ids of its chat prompt, with a placeholder for each image.
        prefix_images: Images in the beginning of its prompt that other rows share.
        prompt: Input of the language model, until the decoder has it.
        failure: Why it cannot be answered.
        is_retryable: Whether the failure may pass, so that its shard is tried again.
        oom_splits: How often a batch with it ran out of memory and was split in half, before the
            decoder had it.
        stage_ns: Time by stage so far.
    """

    request: Request
    cached_images: list[CachedImage] = field(default_factory=list)
    encoded: list[bool] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefix_images: int = 0
    prompt: Prompt | None = None
    failure: BadRow | None = None
    is_retryable: bool = False
    oom_splits: int = 0
    stage_ns: dict[str, int] = field(default_factory=dict)


def views_of(rows: Sequence[RequestState]) -> int:
    """Views of rows; a row without any counts as one, so that batches stay bounded.

    Rows that share an image are each counted with its views, although it is encoded once.
    """
    return sum(max(sum(image.views for image in row.cached_images), 1) for row in rows)


def share_time(
    rows: Sequence[RequestState], stage: str, total_ns: int, weights: Sequence[int]
) -> None:
    """Divide a stage's time among rows by weight; a row may stand there several times."""
    for row, share in zip(rows, apportion(total_ns, weights), strict=True):
        row.stage_ns[stage] = row.stage_ns.get(stage, 0) + share


def run_isolated(items: Sequence[U], work: Callable[[Sequence[U]], None]) -> None:
    """Do work on items, on halves of them where it fails; a failure of one is recorded in it.

    Raises:
        EngineDead: The device is lost.
    """
    if not items:
        return
    try:
        work(items)
    except Exception as error:  # noqa: BLE001 - any error of one row belongs to that row
        failure, is_retryable = failure_from(error), isinstance(error, ShardError)
    else:
        return
    if len(items) == 1:
        items[0].failure, items[0].is_retryable = failure, is_retryable
        return
    for item in items if failure.status == Status.OUT_OF_MEMORY else ():
        item.oom_splits += 1
    half = len(items) // 2
    run_isolated(items[:half], work)
    run_isolated(items[half:], work)


def failure_from(error: Exception) -> BadRow:
    """The failure of a row whose work raised an error.

    Raises:
        EngineDead: The device is lost.
    """
    if isinstance(error, BadRow):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return BadRow(Status.OUT_OF_MEMORY, "the device has not enough memory for this row alone")
    if isinstance(error, torch.AcceleratorError):
        raise device_lost(error) from error
    return BadRow(Status.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")


def device_lost(error: torch.AcceleratorError) -> EngineDead:
    """The error to raise when the device is lost."""
    return EngineDead(f"the device is lost: {error}")

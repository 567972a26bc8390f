"""Trials: one engine answers a sample of the rows in every setting, and the time is measured.

The sample is answered block by block. The settings of a block come in random order and those of
the next block in its reverse, so that drift affects all settings alike. Time is the wall clock of a
block, reading and decoding images included, as in a run.

Not covered: several workers that share a device or a processor.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.errors import ConfigError
from gc2ray.core.metrics.scores import reference_texts
from gc2ray.core.records import UNCOMPRESSED, Answer, Request
from gc2ray.engine.answering import Answering

SAMPLE_PARTS = 8


@dataclass(frozen=True)
class CompressionSetting:
    """A method at a retention.

    Attributes:
        method: Method of compression.
        retention: The fraction KEPT, nominal.
    """

    method: str
    retention: float

    @property
    def name(self) -> str:
        """Name of its policy in an engine."""
        return f"{self.method} at {self.retention:g}"

    def config(self, own: CompressionConfig) -> CompressionConfig:
        """The recipe's compression with this setting."""
        return own.model_copy(update={"method": self.method, "retention": self.retention})


BASELINE = CompressionSetting("none", 1.0)
"""The setting that all others are compared with."""


@dataclass(frozen=True, eq=False)
class Trials:
    """Measurements of a sample in several settings.

    Attributes:
        settings: Uncompressed first.
        seconds: Seconds of each block in each setting, (B, S).
        rows: Rows of each block, (B,).
        answers: By name of the setting and row key.
    """

    settings: tuple[CompressionSetting, ...]
    seconds: np.ndarray
    rows: np.ndarray
    answers: Mapping[str, Mapping[str, Answer]]


def measure(
    engine: Answering,
    requests: Sequence[Request],
    settings: Sequence[CompressionSetting],
    *,
    blocks: int = SAMPLE_PARTS,
    clock: Callable[[], float] = time.perf_counter,
) -> Trials:
    """Answer requests in every setting, interleaved.

    Args:
        engine: Knows each setting as a policy with its name.
        requests: Requests of the sample; those with a fault are left out.
        settings: Compared with no compression.
        blocks: Parts of the sample, of at least two rows each.
        clock: In seconds.

    Raises:
        ConfigError: There are too few rows.
    """
    usable = [request for request in requests if request.fault is None]
    count = min(blocks, len(usable) // 2)
    if count < 2:
        raise ConfigError(
            f"--rows: the sample has {len(usable)} rows that can be answered, too few to compare; "
            "give at least 4"
        )
    parts = [usable[part::count] for part in range(count)]
    every = (
        BASELINE,
        *(setting for setting in settings if setting != BASELINE),
    )
    shuffle = random.Random(0)  # noqa: S311 - an order, not a secret
    seconds = np.zeros((count, len(every)))
    answers: dict[str, dict[str, Answer]] = {setting.name: {} for setting in every}
    for setting in every:  # warms up
        _answered(engine, parts[0], setting)
    order: list[int] = []
    for block, part in enumerate(parts):
        # Every second block reverses the order: over two blocks no setting comes first on average.
        order = order[::-1] if block % 2 else shuffle.sample(range(len(every)), len(every))
        for index in order:
            engine.clear_cache()
            started = clock()
            block_answers = _answered(engine, part, every[index])
            seconds[block, index] = clock() - started
            by_key = {answer.request.row_key: answer for answer in block_answers}
            answers[every[index].name] |= by_key
    return Trials(every, seconds, np.array([len(part) for part in parts]), answers)


def _answered(
    engine: Answering, part: Sequence[Request], setting: CompressionSetting
) -> list[Answer]:
    policy = UNCOMPRESSED if setting == BASELINE else setting.name
    return list(engine.stream(replace(request, policy=policy) for request in part))


def references_of(requests: Sequence[Request], column: str) -> dict[str, list[str]]:
    """Reference answers by row key, from a column that the recipe keeps: a text or a list."""
    return {
        request.row_key: reference_texts(request.kept_columns[column])
        for request in requests
        if column in request.kept_columns
    }

"""Trials: one engine answers a sample of the rows in every setting, and the time is measured.

The sample is answered block by block. The settings of a block come in random order and those of
the next block in its reverse, so that drift affects all settings alike. Time is the wall clock of a
block, reading and decoding images included, as in a run.

Not covered: several workers that share a device or a processor.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gc2ray.core.errors import ConfigError
from gc2ray.core.records import UNCOMPRESSED, Answer, Request
from gc2ray.engine.answering import Answering
from gc2ray.estimation.recommendation import BASELINE, CompressionSetting, Trials

BLOCKS = 8


def measure(
    engine: Answering,
    requests: Sequence[Request],
    settings: Sequence[CompressionSetting],
    *,
    blocks: int = BLOCKS,
    clock: Callable[[], float] = time.perf_counter,
) -> Trials:
    """Answer requests in every setting, interleaved.

    Args:
        engine: Knows each setting as a policy with its name.
        requests: Of the sample; those with a fault are left out.
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
        for place in order:
            engine.clear_cache()
            started = clock()
            block_answers = _answered(engine, part, every[place])
            seconds[block, place] = clock() - started
            by_key = {answer.request.row_key: answer for answer in block_answers}
            answers[every[place].name] |= by_key
    return Trials(every, seconds, np.array([len(part) for part in parts]), answers)


def _answered(
    engine: Answering, part: Sequence[Request], setting: CompressionSetting
) -> list[Answer]:
    policy = UNCOMPRESSED if setting == BASELINE else setting.name
    return list(engine.stream(replace(request, policy=policy) for request in part))


def references_of(requests: Sequence[Request], column: str) -> dict[str, list[str]]:
    """Reference answers by row key, from a column that the recipe keeps: a text or a list."""

    def texts(value: Any) -> list[str]:
        plain = value.as_py() if hasattr(value, "as_py") else value
        values = plain if isinstance(plain, list) else [plain]
        return [str(item) for item in values if item is not None]

    return {
        request.row_key: texts(request.carried[column])
        for request in requests
        if column in request.carried
    }

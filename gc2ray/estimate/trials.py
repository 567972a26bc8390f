"""One engine answers a sample of the rows in every setting: which of them pays here is measured.

It goes block by block, the settings of a block in a drawn order and those of the next in its
reverse, so that what drifts meets all alike. Time is the wall clock of a block, reading and
decoding images included, as in a run.

Not covered: several workers that take from each other.
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
from gc2ray.estimate.recommendation import WHOLE, CompressionSetting, Trials

RETENTIONS = (0.75, 0.5, 0.25, 0.1, 0.05)
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
        engine: Knows each setting as a way with its name.
        requests: Of the sample; faults are left out.
        settings: Beside no compression.
        blocks: Parts of the sample; at least two rows each.
        clock: In seconds.

    Raises:
        ConfigError: There are too few rows.
    """
    asked = [request for request in requests if request.fault is None]
    count = min(blocks, len(asked) // 2)
    if count < 2:
        raise ConfigError(f"--rows: {len(asked)} rows that can be answered are too few to compare")
    parts = [asked[part::count] for part in range(count)]
    every = (WHOLE, *(setting for setting in settings if setting != WHOLE))
    draw = random.Random(0)  # noqa: S311 - an order, not a secret
    seconds = np.zeros((count, len(every)))
    answers: dict[str, dict[str, Answer]] = {setting.name: {} for setting in every}
    for setting in every:  # warms up
        _answered(engine, parts[0], setting)
    order: list[int] = []
    for block, part in enumerate(parts):
        # There and back again: of two blocks together no setting came first on average.
        order = order[::-1] if block % 2 else draw.sample(range(len(every)), len(every))
        for place in order:
            engine.clear_cache()
            started = clock()
            found = _answered(engine, part, every[place])
            seconds[block, place] = clock() - started
            answers[every[place].name] |= {answer.request.row_key: answer for answer in found}
    return Trials(every, seconds, np.array([len(part) for part in parts]), answers)


def _answered(
    engine: Answering, part: Sequence[Request], setting: CompressionSetting
) -> list[Answer]:
    policy = UNCOMPRESSED if setting == WHOLE else setting.name
    return list(engine.stream(replace(request, policy=policy) for request in part))


def references_of(requests: Sequence[Request], column: str) -> dict[str, list[str]]:
    """Right answers by row key, from a column that the recipe keeps: text, or a list of texts."""

    def texts(value: Any) -> list[str]:
        plain = value.as_py() if hasattr(value, "as_py") else value
        values = plain if isinstance(plain, list) else [plain]
        return [str(item) for item in values if item is not None]

    return {
        request.row_key: texts(request.carried[column])
        for request in requests
        if column in request.carried
    }

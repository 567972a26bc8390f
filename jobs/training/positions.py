"""Positions of visual tokens in training: drawn closer together, unevenly.

A language model that only ever saw whole images can read from a token's number where in the image
it lies, and that is lost as soon as a compressor takes tokens out and numbers what is left. So in
most lessons visual tokens advance the position unevenly, and where something lies has to be learned
from what the thumbnail's tokens say. No token is dropped: all are read, some at the position of the
one before.
"""

from __future__ import annotations

import numpy as np

STOCK_SHARE = 0.25
"""Of the images, whose positions stay as they are."""
LEAST_DENSITY = 0.08
"""Mean step from token to token, at the least; at most 1."""
RUN = 24
"""Tokens in a row with one density."""


def squeezed_steps(count: int, seed: int) -> np.ndarray:
    """How far each of `count` visual tokens lies behind the one before: 0 or 1, int64 (count,)."""
    rng = np.random.default_rng(seed)
    if rng.random() < STOCK_SHARE:
        return np.ones(count, dtype=np.int64)
    density = LEAST_DENSITY ** rng.random()  # log-uniform
    local = np.repeat(density * rng.exponential(1.0, -(-count // RUN)), RUN)[:count]
    return (rng.random(count) < local).astype(np.int64)

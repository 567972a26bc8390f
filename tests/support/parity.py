"""Rows with prompts of their own, and what a check of a model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.engine.parity.check import check_parity
from gc2ray.engine.parity.result import Parity
from tests.support.rows import SIZES, encoded, make_job, picture


def write_rows(
    path: Path, prompts: tuple[str | None, ...], sizes: Sequence[tuple[int, int]] = SIZES
) -> Path:
    images = [
        {"bytes": encoded(picture(size, seed)), "path": None}
        for seed, size in zip(range(len(prompts)), sizes, strict=False)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "prompt": list(prompts)}), path)
    return path


def checked(model: Path, source: Path, **changes: Any) -> Parity:
    settings = {"compression__retention": 0.5, "generation__max_new_tokens": 8, **changes}
    job = make_job(model, source, **settings)
    data = job.model_dump(mode="json")
    data["recipe"]["input"]["prompt"] = {"column": "prompt"}
    return check_parity(type(job).model_validate(data), rows=10)

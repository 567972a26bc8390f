"""Rows and recipes for tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gc2ray.core.config.job import Job, parse_job
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.records import ImageRef, Request

SIZES = [(100, 200), (200, 100), (168, 168), (40, 300), (25, 30), (480, 640), (37, 100)]
"""Seven (height, width) that need all grids of the tiny model."""


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A smooth random image: resizing keeps its structure, so answers differ between images."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The image as a file; `options` are Pillow's."""
    buffer = io.BytesIO()
    quick = {"compress_level": 1} if kind == "PNG" else {}
    image.save(buffer, kind, **{**quick, **options})
    return buffer.getvalue()


def request(
    size: tuple[int, int] = (100, 200), seed: int = 0, prompt: str = "What is in the picture?"
) -> Request:
    return Request(
        row_key=f"rows.parquet#{seed}",
        source="rows.parquet",
        row=seed,
        images=(ImageRef(data=encoded(picture(size, seed))),),
        prompts=(prompt,),
    )


def requests(sizes: Sequence[tuple[int, int]] = SIZES) -> list[Request]:
    return [request(size, seed) for seed, size in enumerate(sizes)]


def job_data(model: Path | str, source: Path | str, output: Path | str) -> dict[str, Any]:
    return {
        "output": str(output),
        "recipe": {
            "model": {"path": str(model), "dtype": "float32"},
            "compression": {"method": "globalcom2", "retention": 0.25},
            "generation": {"max_new_tokens": 8},
            "input": {"uri": str(source), "prompt": {"constant": "What is in the picture?"}},
        },
        "cluster": {"workers": 2},
    }


def make_job(
    model: Path | str, source: Path | str = "in", output: Path | str = "out", **changes: Any
) -> Job:
    """A job; `changes` are `section__key=value`, as in `compression__retention=1.0`."""
    data = job_data(model, source, output)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        owner = data if section == "cluster" else data["recipe"]
        owner[section] = {**owner.get(section, {}), key: value}
    return parse_job(data)


def make_recipe(model: Path | str, **changes: Any) -> Recipe:
    return make_job(model, **changes).recipe


def question_list(row: int) -> list[str | None] | None:
    """The prompts of a row of `write_rows`: none to four, now and then a null."""
    if row % 7 == 3:
        return None
    return [None if (row + i) % 11 == 5 else f"Question {row}.{i}?" for i in range(row % 5)]


def prompts_of(row: int) -> int:
    """How many answers the row gives."""
    return len(question_list(row) or [None])


def write_rows(path: Path, count: int, *, row_group: int = 8, prompts: bool = True) -> Path:
    """A Parquet of small pictures: struct image column, prompt, list of prompts, id."""
    images = [
        {"bytes": encoded(picture((20 + i % 7, 30 - i % 5), i)), "path": None} for i in range(count)
    ]
    columns: dict[str, Any] = {
        "id": pa.array(range(count), pa.int64()),
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    }
    if prompts:
        columns["prompt"] = pa.array([f"Question {i}?" for i in range(count)], pa.string())
        columns["prompts"] = pa.array(map(question_list, range(count)), pa.list_(pa.string()))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path

"""Scenes as rows of a Parquet file, in the form of users' data.

Columns: `id`, `image` (struct of bytes and path), `question`, `reference` (the right answer) and
`topic`. Row i of a split is the same for ever: topics and crop grids take turns, everything else
is drawn from the seed (split, i). The splits' seeds differ in their first number, so no scene is in
two.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gc2ray.demo.drawing import draw
from gc2ray.demo.questions import TOPICS, Question
from gc2ray.demo.scenes import Scene, Style, sample_scene
from gc2ray.demo.spec import GRIDS, demo_anyres

QUALITY = 92
ROW_GROUP = 64


class Split(Enum):
    """Whose scenes: the first number of every seed."""

    TRAIN = 1
    VALIDATION = 2
    TEST = 3


@dataclass(frozen=True)
class DemoRow:
    """A scene, one question about it, and the picture as a JPEG file."""

    id: str
    scene: Scene
    question: Question
    image: bytes


def demo_rows(
    split: Split, count: int, photographs: Sequence[Image.Image], first: int = 0
) -> Iterator[DemoRow]:
    """Rows `first` to `first + count` of a split."""
    topics = tuple(TOPICS)
    for index in range(first, first + count):
        rng = np.random.default_rng([split.value, index])
        grid = GRIDS[index // len(topics) % len(GRIDS)]
        scene, question = _asked(rng, topics[index % len(topics)], grid)
        name = f"{split.name.lower()}-{index:06d}"
        yield DemoRow(name, scene, question, picture(scene, photographs))


def _asked(rng: np.random.Generator, topic: str, grid: tuple[int, int]) -> tuple[Scene, Question]:
    """A scene that allows a question on the topic, and one of those that it allows."""
    style = Style(sign=1.0) if topic == "sign" else Style()
    while True:  # a sign may find no room, and then there is nothing to ask
        scene = sample_scene(rng, demo_anyres(), grid, style)
        if questions := TOPICS[topic](scene):
            return scene, questions[int(rng.integers(len(questions)))]


def write_rows(path: Path, rows: Iterator[DemoRow]) -> int:
    """Write rows to a Parquet file; returns how many."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", image),
            ("question", pa.string()),
            ("reference", pa.string()),
            ("topic", pa.string()),
        ]
    )
    listed = [
        {
            "id": row.id,
            "image": {"bytes": row.image, "path": None},
            "question": row.question.text,
            "reference": row.question.answer,
            "topic": row.question.topic,
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(listed, schema), path, row_group_size=ROW_GROUP)
    return len(listed)


def picture(scene: Scene, photographs: Sequence[Image.Image]) -> bytes:
    """The scene as a JPEG file."""
    buffer = io.BytesIO()
    draw(scene, photographs).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()

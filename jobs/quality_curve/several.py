"""Rows of two images: a row's own, and one on which the answer to its question does not depend.

The other image comes after the row's own in one row, before it in the next. It shows neither a kind
nor a colour of the row's things, and no sign; topics whose answers it would change are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gc2ray.demo.rows import DemoRow
from gc2ray.demo.scenes import Scene

TOPICS = ("which", "colour", "where", "sign")


@dataclass(frozen=True)
class RowWithImages:
    """A row with its own image, and perhaps another.

    Attributes:
        row: Its question and answer.
        images: The rows whose images it shows, in order.
    """

    row: DemoRow
    images: tuple[DemoRow, ...]


def rows_with_images(rows: Sequence[DemoRow], images: int) -> list[RowWithImages]:
    """Rows with 1 or 2 images each, in their order.

    Of two, the other image is that of the next row that fits; rows that find none are left out.
    """
    if images == 1:
        return [RowWithImages(row, (row,)) for row in rows]
    found: list[RowWithImages] = []
    for place, row in enumerate(rows):
        behind = (*rows[place + 1 :], *rows[:place])
        other = next((each for each in behind if _fits(row, each.scene)), None)
        if other is not None:
            found.append(RowWithImages(row, (row, other) if len(found) % 2 == 0 else (other, row)))
    return found


def _fits(row: DemoRow, other: Scene) -> bool:
    if row.question.topic not in TOPICS or other.sign is not None:
        return False
    return not set(_kinds_and_colours(row.scene)) & set(_kinds_and_colours(other))


def _kinds_and_colours(scene: Scene) -> Iterator[str]:
    for thing in scene.things:
        yield from (thing.kind, thing.colour)

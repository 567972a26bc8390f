"""Rows of two images: a row's own, and one on which the answer to its question does not depend.

By turns the other image stands behind and before the row's own. It shows neither a kind nor a
colour of the row's things, and no sign; topics whose answers it would change are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gc2ray.demo.rows import DemoRow
from gc2ray.demo.scenes import Scene

TOPICS = ("which", "colour", "where", "sign")


@dataclass(frozen=True)
class Asked:
    """A row with the images that it shows.

    Attributes:
        row: Its question and answer.
        shown: Whose images, in order.
    """

    row: DemoRow
    shown: tuple[DemoRow, ...]


def asked_rows(rows: Sequence[DemoRow], images: int) -> list[Asked]:
    """The rows that are answered with so many images each, 1 or 2, in their order.

    Of two, the other image is that of the next row that fits; rows that find none are left out.
    """
    if images == 1:
        return [Asked(row, (row,)) for row in rows]
    found: list[Asked] = []
    for place, row in enumerate(rows):
        behind = (*rows[place + 1 :], *rows[:place])
        other = next((each for each in behind if _fits(row, each.scene)), None)
        if other is not None:
            found.append(Asked(row, (row, other) if len(found) % 2 == 0 else (other, row)))
    return found


def _fits(row: DemoRow, other: Scene) -> bool:
    if row.question.topic not in TOPICS or other.sign is not None:
        return False
    return not set(_looks(row.scene)) & set(_looks(other))


def _looks(scene: Scene) -> Iterator[str]:
    for thing in scene.things:
        yield from (thing.kind, thing.colour)

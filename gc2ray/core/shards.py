"""What is handed out: `SourceFile` -> `Span` -> `Shard`, and `Shards`, many of them in columns.

A shard is an object only while somebody looks at it. A plan of a billion rows is a few dozen bytes
for each shard, and the driver holds nothing else of the shards that wait.

Not covered: where shards are stored (`gc2ray.output.plan`), and which are done
(`gc2ray.output.planner`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SourceFile:
    """An input file: path relative to the input root, fingerprint, rows of each row group."""

    source: str
    fingerprint: str
    groups: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the file."""
        return sum(self.groups)


@dataclass(frozen=True)
class Span:
    """Rows `first` up to, not including, `stop` of one file as it was when planned."""

    source: str
    fingerprint: str
    first: int
    stop: int

    @property
    def rows(self) -> int:
        """Rows of the span."""
        return self.stop - self.first


@dataclass(frozen=True)
class Shard:
    """The unit of hand-out, retry and commit.

    Attributes:
        index: Its place in the plan.
        sid: Digest of recipe and spans.
        spans: Its rows.
        continues: It begins within a row group, where the shard before it ends: whoever has read
            that one need not find the place again.
    """

    index: int
    sid: str
    spans: tuple[Span, ...]
    continues: bool = False

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(span.rows for span in self.spans)

    def places(self) -> Iterator[tuple[str, int]]:
        """Source and row number of every row; how many prompts it has only reading tells."""
        for span in self.spans:
            yield from ((span.source, row) for row in range(span.first, span.stop))

    @property
    def part_name(self) -> str:
        """Where its answers are committed."""
        return part_name(self.index, self.sid)


class SpanColumns(NamedTuple):
    """Spans in columns, shard by shard: of each its shard, file (an index), first and stop row."""

    shard: Integers
    file: Integers
    first: Integers
    stop: Integers


class Shards(Sequence[Shard]):
    """Shards in columns, in order of their index from 0.

    Args:
        files: Source and fingerprint of every file that a span is of.
        spans: The spans.
        sids: Of each shard, as integers.
        continues: Of each shard.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, str]],
        spans: SpanColumns,
        sids: npt.NDArray[np.uint64],
        continues: Booleans,
    ) -> None:
        self.files = tuple(files)
        self.spans = SpanColumns(
            spans.shard.astype(np.int64),
            spans.file.astype(np.int32),
            spans.first.astype(np.int64),
            spans.stop.astype(np.int64),
        )
        self.sids = sids.astype(np.uint64)
        self.continues = continues.astype(np.bool_)
        self._edges = np.searchsorted(self.spans.shard, np.arange(len(sids) + 1))

    @staticmethod
    def from_shards(shards: Iterable[Shard]) -> Shards:
        """Shards one after the other, whatever their index was."""
        files: dict[tuple[str, str], int] = {}
        spans, sids, continues = array("q"), array("Q"), bytearray()
        for index, shard in enumerate(shards):
            sids.append(int(shard.sid, 16))
            continues.append(shard.continues)
            for span in shard.spans:
                file = files.setdefault((span.source, span.fingerprint), len(files))
                spans.extend((index, file, span.first, span.stop))
        columns = np.array(spans, np.int64).reshape(-1, len(SpanColumns._fields))
        return Shards(
            tuple(files),
            SpanColumns(*columns.T),
            np.array(sids, np.uint64),
            np.array(continues, np.bool_),
        )

    def followed_by(self, others: Shards) -> Shards:
        """These, and others numbered on from them."""
        own, more = self.spans, others.spans
        spans = SpanColumns(
            np.concatenate([own.shard, more.shard + len(self)]),
            np.concatenate([own.file, more.file + len(self.files)]),
            np.concatenate([own.first, more.first]),
            np.concatenate([own.stop, more.stop]),
        )
        sids = np.concatenate([self.sids, others.sids])
        continues = np.concatenate([self.continues, others.continues])
        return Shards([*self.files, *others.files], spans, sids, continues)

    def __len__(self) -> int:
        return len(self.sids)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Shard, ...]: ...
    def __getitem__(self, index: int | slice) -> Shard | tuple[Shard, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        index = range(len(self))[index]  # negative ones too; IndexError beyond
        columns = self.spans
        places = range(self._edges[index], self._edges[index + 1])
        files = [self.files[columns.file[at]] for at in places]
        spans = tuple(
            Span(source, fingerprint, int(columns.first[at]), int(columns.stop[at]))
            for at, (source, fingerprint) in zip(places, files, strict=True)
        )
        return Shard(index, self.sid(index), spans, bool(self.continues[index]))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Shards)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]  # as other containers of their size

    def sid(self, index: int) -> str:
        """The sid of a shard."""
        return f"{int(self.sids[index]):016x}"

    def part_name(self, index: int) -> str:
        """The `part_name` of a shard."""
        return part_name(index, self.sid(index))

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return int((self.spans.stop - self.spans.first).sum())

    @property
    def rows_each(self) -> Integers:
        """Rows of each shard, (shards,)."""
        rows = np.zeros(len(self), np.int64)
        np.add.at(rows, self.spans.shard, self.spans.stop - self.spans.first)
        return rows


def part_name(index: int, sid: str) -> str:
    """The name of a shard's part, relative to the directory of its round."""
    return f"data/part-{index:07d}-{sid}.parquet"


def row_key(source: str, row: int, prompt_index: int | None = None) -> str:
    """The key of an answer row, unique in a run.

    Args:
        source: Path of the source, relative to the input root.
        row: Row number in the source.
        prompt_index: Which prompt of a list; None where prompts are no lists.
    """
    return f"{source}#{row}" if prompt_index is None else f"{source}#{row}#{prompt_index}"


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def runs(chosen: Booleans) -> Iterator[slice]:
    """Runs of places that are chosen, in order."""
    steps = np.diff(chosen.astype(np.int8), prepend=0, append=0)
    for first, stop in zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0), strict=True):
        yield slice(int(first), int(stop))


def first_spans(files: Sequence[SourceFile], rows: int) -> list[Span]:
    """Spans of the first `rows` rows of the input, or of all there are."""
    spans: list[Span] = []
    for file in files:
        stop = min(rows, file.rows)
        if stop > 0:
            spans.append(Span(file.source, file.fingerprint, 0, stop))
            rows -= stop
    return spans


def cut_shards(
    files: Iterable[SourceFile], shard_rows: int, recipe_fingerprint: str
) -> Iterator[Shard]:
    """Cut files into shards of about `shard_rows` rows, at row-group borders where possible."""
    return _cut(_pieces(files, shard_rows), shard_rows, recipe_fingerprint)


def cut_spans(spans: Iterable[Span], shard_rows: int, recipe_fingerprint: str) -> Iterator[Shard]:
    """Cut spans, in their order, into shards of at most `shard_rows` rows."""
    pieces = (
        (replace(span, first=first, stop=min(span.stop, first + shard_rows)), first > span.first)
        for span in spans
        for first in range(span.first, span.stop, shard_rows)
    )
    return _cut(pieces, shard_rows, recipe_fingerprint)


def _cut(
    pieces: Iterable[tuple[Span, bool]], shard_rows: int, recipe_fingerprint: str
) -> Iterator[Shard]:
    """Pack pieces into shards; True marks one that begins where the piece before it ends."""
    pending: list[Span] = []
    rows, begins_within = 0, False
    indices = itertools.count()

    def closed() -> Shard:
        spans = tuple(pending)
        return Shard(next(indices), _sid(recipe_fingerprint, spans), spans, begins_within)

    for piece, within in pieces:
        if pending and rows + piece.rows > shard_rows:
            yield closed()
            pending, rows = [], 0
        if not pending:
            begins_within = within
        rows += piece.rows
        last = pending[-1] if pending else None
        if last and (last.source, last.stop) == (piece.source, piece.first):
            pending[-1] = replace(last, stop=piece.stop)
        else:
            pending.append(piece)
    if pending:
        yield closed()


def _pieces(files: Iterable[SourceFile], shard_rows: int) -> Iterator[tuple[Span, bool]]:
    """Row groups, those above `shard_rows` in near-equal parts: True for all but the first."""
    for file in files:
        first = 0
        for rows in file.groups:
            parts = max(1, -(-rows // shard_rows))
            cuts = [first + rows * part // parts for part in range(parts + 1)]
            for start, stop in itertools.pairwise(cuts):
                if stop > start:
                    yield Span(file.source, file.fingerprint, start, stop), start > first
            first += rows


def _sid(recipe_fingerprint: str, spans: Sequence[Span]) -> str:
    identity = json.dumps([recipe_fingerprint, *(vars(span) for span in spans)])
    return digest(identity.encode())[:16]

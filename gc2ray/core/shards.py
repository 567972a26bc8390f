"""Units of work: `SourceFile` -> `Span` -> `Shard`, and `Shards`, which holds many in columns.

A `Shard` object is made only when it is used. In columns a shard takes a few dozen bytes, so the
driver can hold the plan of a billion rows.

Not covered: how shards are stored (`gc2ray.output.plan`), and which are done
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
    """The unit of work: it is assigned, retried and committed as a whole.

    Attributes:
        index: Its index in the plan.
        sid: Digest of recipe and spans.
        spans: Its rows.
        continues: Whether it begins inside a row group, where the shard before it ends; the worker
            that read that shard can continue reading.
    """

    index: int
    sid: str
    spans: tuple[Span, ...]
    continues: bool = False

    @property
    def rows(self) -> int:
        """Rows of the shard."""
        return sum(span.rows for span in self.spans)

    def row_ids(self) -> Iterator[tuple[str, int]]:
        """Source and row number of every row."""
        for span in self.spans:
            yield from ((span.source, row) for row in range(span.first, span.stop))

    @property
    def part_name(self) -> str:
        """Where its answers are committed."""
        return part_name(self.index, self.sid)


class SpanColumns(NamedTuple):
    """Spans in columns, shard by shard: index of the shard and of the file, first and stop row."""

    shard: Integers
    file: Integers
    first: Integers
    stop: Integers


class Shards(Sequence[Shard]):
    """Shards in columns, in order of their index from 0.

    Args:
        files: Source and fingerprint of every file.
        spans: The spans.
        sids: The sid of each shard, as an integer.
        continues: Whether each shard begins inside a row group, see `Shard.continues`.
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
        """Shards in the given order, numbered from 0."""
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
        """These shards, followed by others with indices that continue."""
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
        positions = range(self._edges[index], self._edges[index + 1])
        files = [self.files[columns.file[at]] for at in positions]
        spans = tuple(
            Span(source, fingerprint, int(columns.first[at]), int(columns.stop[at]))
            for at, (source, fingerprint) in zip(positions, files, strict=True)
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
        prompt_index: Index of the prompt; None if the prompt column does not hold lists.
    """
    return f"{source}#{row}" if prompt_index is None else f"{source}#{row}#{prompt_index}"


def bytes_digest(data: bytes) -> str:
    """The SHA-256 of data, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def runs(chosen: Booleans) -> Iterator[slice]:
    """Runs of chosen positions, in order."""
    steps = np.diff(chosen.astype(np.int8), prepend=0, append=0)
    for first, stop in zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0), strict=True):
        yield slice(int(first), int(stop))


def first_spans(files: Sequence[SourceFile], rows: int) -> list[Span]:
    """Spans of the first `rows` rows of the input, or of all rows if there are fewer."""
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
    """Pack pieces into shards; True marks a piece that begins inside a row group."""
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
    """Row groups, large ones in near-equal pieces; True for all but the first piece of one."""
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
    return bytes_digest(identity.encode())[:16]

"""The latest answers of an output, over its rounds.

Among the answers to a prompt, an `ok` answer wins over a failed one; among equals, the latest round
wins. Answers are read shard by shard of round 0, in input order. Memory holds at most one part of
each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gc2ray.core.errors import Status
from gc2ray.core.shards import Booleans, Integers, Shard, Shards, Span, runs
from gc2ray.output.parts import read_part
from gc2ray.output.run_directory import Round

MERGED_BY = ("source", "row", "prompt_index", "status", "retry_round")
"""Columns that decide which answer is the latest."""
_ROW_BITS = 40
"""Bits of a 64-bit number that hold a row's number; the others hold its file's number."""


class Latest:
    """The latest answers over several rounds.

    Args:
        rounds: Round 0 and its retries, in order, each with the mask of its committed shards,
            (shards,).
    """

    def __init__(self, rounds: Sequence[tuple[Round, Booleans]]) -> None:
        (first, self._committed), *retries = rounds
        self._first = first
        self._retries = [_RetriedShards.from_rounds(first, retry, done) for retry, done in retries]
        self._read: dict[int, tuple[int, Sequence[str] | None, pa.Table]] = {}

    def retried(self) -> Booleans:
        """Which shards of round 0 have answers in later rounds, (shards,)."""
        mask = np.zeros(len(self._committed), np.bool_)
        for retry in self._retries:
            mask[retry.owners] = True
        return mask

    def unanswered(self, index: int) -> Booleans:
        """Which rows of a shard of round 0 have no answer in any round, (rows,)."""
        shard = self._first.plan.shards[index]
        missing = np.full(shard.rows, not self._committed[index])
        for retry in self._retries:
            for number in retry.shards_of(index):
                for span in retry.round.plan.shards[number].spans:
                    missing[_slice_of(shard, span)] = False
        return missing

    def answers(self, index: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The latest answers to the rows of a shard of round 0, in input order.

        Args:
            index: Index of the shard.
            columns: Columns to read; with several rounds they must include `MERGED_BY`. None:
                all columns.

        Returns:
            The answers; None if no round has any.

        Raises:
            OSError: A part cannot be read.
        """
        shard = self._first.plan.shards[index]
        later = [
            self._retried(retry, number, columns)
            for retry in self._retries
            for number in retry.shards_of(index)
        ]
        own = (
            [read_part(self._first.store, shard.part_name, columns)]
            if self._committed[index]
            else []
        )
        if not later:
            return own[0] if own else None
        return _merged(shard, [*own, *later])

    def _retried(
        self, retry: _RetriedShards, index: int, columns: Sequence[str] | None
    ) -> pa.Table:
        """A part of a retry; the last part is cached because it has rows of several shards."""
        number = retry.round.number
        cached = self._read.get(number)
        if cached is None or cached[:2] != (index, columns):
            part = retry.round.plan.shards[index].part_name
            cached = self._read[number] = (
                index,
                columns,
                read_part(retry.round.store, part, columns),
            )
        return cached[2]


class _RetriedShards(NamedTuple):
    """Pairs of shards: one of round 0, and a committed one of a retry that has rows of it."""

    round: Round
    owners: Integers  # of round 0, ascending
    shards: Integers  # of the retry

    @staticmethod
    def from_rounds(first: Round, retry: Round, committed: Booleans) -> _RetriedShards:
        """The pairs of a retry."""
        spans = retry.plan.shards.spans
        pairs = np.stack([owners(first.plan.shards, retry.plan.shards), spans.shard])
        pairs = np.unique(pairs[:, committed[spans.shard] & (pairs[0] >= 0)], axis=1)
        return _RetriedShards(retry, *pairs)

    def shards_of(self, owner: int) -> list[int]:
        """The shards of the retry that have rows of a shard of round 0."""
        first, stop = np.searchsorted(self.owners, [owner, owner + 1])
        return [int(shard) for shard in self.shards[first:stop]]


def owners(shards: Shards, others: Shards) -> Integers:
    """For each span of `others`, the shard of `shards` that has all its rows; -1 if none has."""
    numbers = {file: number for number, file in enumerate(shards.files)}
    files = np.array([numbers.get(file, -1) for file in others.files], np.int64)
    own, spans = shards.spans, others.spans
    if not len(own.file):
        return np.full(len(spans.file), -1)
    begins = (own.file.astype(np.int64) << _ROW_BITS) + own.first
    order = np.argsort(begins)
    file = files[spans.file]
    slot = np.searchsorted(begins[order], (file << _ROW_BITS) + spans.first, side="right") - 1
    at = order[np.maximum(slot, 0)]
    inside = (own.file[at] == file) & (own.first[at] <= spans.first) & (spans.stop <= own.stop[at])
    return np.where(inside, own.shard[at], -1)


def spans_where(shard: Shard, chosen: Booleans) -> list[Span]:
    """Runs of chosen rows of a shard.

    Args:
        shard: The shard.
        chosen: Whether each of its rows is, (rows,).
    """
    spans, offset = [], 0
    for span in shard.spans:
        for run in runs(chosen[offset : offset + span.rows]):
            first, stop = span.first + run.start, span.first + run.stop
            spans.append(Span(span.source, span.fingerprint, first, stop))
        offset += span.rows
    return spans


def row_positions(shard: Shard, table: pa.Table) -> Integers:
    """For each answer row, the position of its input row in a shard, from 0; -1 if it has none."""
    position, offset = np.full(len(table), -1), 0
    rows = table["row"].to_numpy()
    for span in shard.spans:
        inside = pc.equal(table["source"], span.source).to_numpy()
        inside &= (rows >= span.first) & (rows < span.stop)
        position[inside] = offset + rows[inside] - span.first
        offset += span.rows
    return position


def _slice_of(shard: Shard, wanted: Span) -> slice:
    """Where the rows of a span are in a shard; an empty slice if they are not in it."""
    offset = 0
    for span in shard.spans:
        if span.source == wanted.source and span.first <= wanted.first < span.stop:
            start = offset + wanted.first - span.first
            return slice(start, start + wanted.rows)
        offset += span.rows
    return slice(0, 0)


def _merged(shard: Shard, tables: Sequence[pa.Table]) -> pa.Table:
    """The latest answer to each prompt of a shard's rows, in order."""
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    position, prompt = row_positions(shard, table), table["prompt_index"].to_numpy()
    failed = pc.not_equal(table["status"], str(Status.OK)).to_numpy()
    order = np.lexsort((-table["retry_round"].to_numpy(), failed, prompt, position))
    order = order[position[order] >= 0]
    prompts = np.stack([position[order], prompt[order]])
    latest = np.diff(prompts, axis=1, prepend=-1).any(axis=0)
    return table.take(order[latest])

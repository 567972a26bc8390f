"""A part compared with the shard that it answers: its footer, and each of its rows.

Only the first problem is reported, in a line that begins with the part's name.

Not covered: the input is not read, so the number of prompts of a row is not known. If the last
prompts of a row are missing, the counts in the footer differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.schema import ANSWER_FIELDS, UNWRITTEN_STATS, answer_schema, table_stats
from gc2ray.core.shards import Integers, Shard, row_key
from gc2ray.core.stats import RunStats
from gc2ray.data.parquet_footer import open_parquet
from gc2ray.output.parts import PartFooter
from gc2ray.output.run_directory import Round


@dataclass(frozen=True)
class PartCheck:
    """The result of a check: rows and statistics of a good part, or the problem of a bad one."""

    rows: int = 0
    stats: RunStats = field(default_factory=RunStats)
    problem: str | None = None


def check_part(this_round: Round, index: int, *, deep: bool) -> PartCheck:
    """Compare a shard's part with the plan.

    Args:
        this_round: The round.
        index: Index of the shard.
        deep: Read the rows too, not only the footer.

    Raises:
        ConfigError: Another version of gc2ray wrote the part.
        OSError: The storage does not answer.
    """
    shard = this_round.plan.shards[index]
    try:
        metadata = this_round.store.metadata(shard.part_name)
        footer = PartFooter.from_metadata(metadata)
    except ConfigError as error:
        raise ConfigError(f"{this_round.name(shard.part_name)}: {error}") from error
    except ValueError:
        return _bad(this_round, shard, "not a part that gc2ray wrote, or incomplete")
    problem = next(_footer_problems(this_round, shard, footer, metadata), None)
    if deep and problem is None:
        problem = next(_content_problems(this_round, shard, footer), None)
    return _bad(this_round, shard, problem) if problem else PartCheck(footer.rows, footer.stats)


def _bad(this_round: Round, shard: Shard, problem: str) -> PartCheck:
    name = this_round.name(shard.part_name)
    again = "run again" if this_round.number == 0 else "retry again"
    return PartCheck(problem=f"{name}: {problem}; move it away, and {again}")


def _footer_problems(
    this_round: Round, shard: Shard, footer: PartFooter, metadata: pq.FileMetaData
) -> Iterator[str]:
    plan = this_round.plan
    if footer.sid != shard.sid:
        yield f"its footer is of shard {footer.sid}"
    if footer.run != plan.recipe_fingerprint:
        yield f"answers another recipe, {footer.run}"
    if footer.rows != shard.rows:
        yield f"answers {footer.rows} rows, planned are {shard.rows}"
    expected, schema = answer_schema(plan.kept_columns), metadata.schema.to_arrow_schema()
    if not schema.equals(expected, check_metadata=False):
        yield f"its schema is another: {_schema_difference(expected, schema)}"


def _schema_difference(expected: pa.Schema, actual: pa.Schema) -> str:
    for name in expected.names:
        if name not in actual.names:
            return f"no column {name!r}"
        if not actual.field(name).equals(expected.field(name)):
            return (
                f"{_described(actual.field(name))}, planned is {_described(expected.field(name))}"
            )
    extra = [name for name in actual.names if name not in expected.names]
    return f"column {extra[0]!r} was not planned" if extra else "the columns' order"


def _described(item: pa.Field) -> str:
    return f"{item.name!r} {item.type}{'' if item.nullable else ' not null'}"


def _content_problems(this_round: Round, shard: Shard, footer: PartFooter) -> Iterator[str]:
    data = this_round.store.read(shard.part_name)
    if data is None:
        yield "vanished while it was read"
        return
    try:
        table = _readable(data, this_round.plan.kept_columns)
    except (OSError, pa.ArrowException) as error:
        yield f"cannot be read: {' '.join(str(error).split())}"
        return
    yield from _row_problems(table, shard)
    yield from _value_problems(table, this_round.number, footer)
    yield from _count_problems(footer.stats, table_stats(table))


def _readable(data: bytes, kept_columns: pa.Schema) -> pa.Table:
    """The answer columns. Kept columns may be large: they are read one by one, and dropped."""
    file = open_parquet(pa.BufferReader(data), check_pages=True)
    for name in kept_columns.names:
        file.read(columns=[name], use_threads=False)
    return file.read(columns=[item.name for item in ANSWER_FIELDS], use_threads=False)


def _row_problems(table: pa.Table, shard: Shard) -> Iterator[str]:
    """The first answer that is not of the planned row and prompt at its place."""
    sources, keys = table["source"].to_numpy(), table["row_key"].to_numpy()
    rows, prompts = table["row"].to_numpy(), table["prompt_index"].to_numpy()
    starts = np.flatnonzero(prompts == 0)
    begun = np.searchsorted(starts, np.arange(len(rows)), side="right") - 1
    planned_sources, planned_rows = _planned(shard)
    turn = np.clip(begun, 0, shard.rows - 1)
    fits = (begun >= 0) & (begun < shard.rows)
    fits &= (rows == planned_rows[turn]) & (sources == planned_sources[turn])
    if len(starts):
        fits &= prompts == np.arange(len(rows)) - starts[np.maximum(begun, 0)]
    if not fits.all():
        at = int(np.argmin(fits))
        before = f"after {keys[at - 1]}" if at else "at its beginning"
        yield f"answers {keys[at]} {before}, which is not planned so"
    elif len(starts) < shard.rows:
        missing = len(starts)
        yield f"no answer to {planned_sources[missing]}#{planned_rows[missing]}"
    else:
        yield from _key_problems(keys, sources, rows, prompts)


def _planned(shard: Shard) -> tuple[npt.NDArray[np.object_], Integers]:
    """Source and row number of every planned row."""
    sources = np.array([span.source for span in shard.spans], object)
    counts = [span.rows for span in shard.spans]
    rows = [np.arange(span.first, span.stop) for span in shard.spans]
    return np.repeat(sources, counts), np.concatenate(rows)


def _key_problems(
    keys: npt.NDArray[np.object_],
    sources: npt.NDArray[np.object_],
    rows: Integers,
    prompts: Integers,
) -> Iterator[str]:
    """The first key that does not name its row; in a source all keys name a prompt, or none."""
    names, first, number = np.unique(sources.astype(str), return_index=True, return_inverse=True)
    plain = [row_key(str(name), int(rows[at])) for name, at in zip(names, first, strict=True)]
    listed = keys[first] != np.array(plain, object)
    np.logical_or.at(listed, number, prompts > 0)
    for key, source, row, prompt, names_it in zip(
        keys, sources, rows.tolist(), prompts.tolist(), listed[number], strict=True
    ):
        expected = row_key(source, row, prompt if names_it else None)
        if key != expected:
            yield f"{expected} has the row_key {key}"
            return


def _value_problems(table: pa.Table, number: int, footer: PartFooter) -> Iterator[str]:
    allowed: dict[str, set[Any]] = {
        "status": {*Status},
        "retry_round": {number},
        "worker": {footer.worker},
    }
    for column, values in allowed.items():
        others = set(pc.unique(table[column]).to_pylist()) - values
        if others:
            yield f"has answers of {column} {min(others)!r}"


def _count_problems(footer: RunStats, rows: RunStats) -> Iterator[str]:
    """The statistics in which the footer and the rows differ."""
    for item in fields(RunStats):
        in_footer, in_rows = getattr(footer, item.name), getattr(rows, item.name)
        if item.name not in UNWRITTEN_STATS and in_footer != in_rows:
            yield f"{item.name} is {in_footer} by its footer, {in_rows} by its rows"

"""A part: the answers of a shard as one Parquet file, each planned row in it, in order."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.errors import ShardError
from gc2ray.core.records import Answer
from gc2ray.core.schema import Provenance, answer_schema, answer_table
from gc2ray.core.shards import Shard
from gc2ray.data.store import PartFooter


def in_order(shard: Shard, answers: Iterable[Answer]) -> list[Answer]:
    """A shard's answers by row, then prompt.

    Raises:
        ShardError: A planned row has no answer, a row was not planned, or a prompt is missing.
    """
    by_row: dict[tuple[str, int], list[Answer]] = {place: [] for place in shard.places()}
    for answer in answers:
        place = (answer.request.source, answer.request.row)
        if place not in by_row:
            raise ShardError(f"{answer.request.row_key} is answered, but not planned")
        by_row[place].append(answer)
    for (source, row), found in by_row.items():
        found.sort(key=lambda answer: answer.request.prompt_index)
        answered = [answer.request.prompt_index for answer in found]
        if not answered:
            raise ShardError(f"{source}#{row} is planned, but was not answered")
        prompts = found[0].request.prompt_count
        if answered != list(range(prompts)):
            told = ", ".join(map(str, answered))
            raise ShardError(f"{source}#{row} has {prompts} prompts, from 0; answered: {told}")
    return [answer for found in by_row.values() for answer in found]


def part_bytes(
    answers: Sequence[Answer], carried: pa.Schema, provenance: Provenance, footer: PartFooter
) -> bytes:
    """The file, with its footer."""
    table = answer_table(answers, carried, provenance)
    table = table.cast(answer_schema(carried, footer.metadata()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()

"""Parts: the answers of one shard in one Parquet file, and the footer that describes it.

`part_bytes` makes the file, `commit_part` publishes it, and the `read_…` functions read it back. A
part is committed by creating its final name atomically: that object is the commit marker. A writer
that finds the name taken compares the token in the footer with its own. If they are equal, only the
acknowledgement of its write was lost, and it has won; otherwise another writer was faster.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Answer
from gc2ray.core.schema import (
    SCHEMA_KEY,
    SCHEMA_VERSION,
    Provenance,
    answer_schema,
    answer_table,
)
from gc2ray.core.shards import Booleans, Shard, Shards
from gc2ray.core.stats import RunStats
from gc2ray.data.parquet_footer import FOOTER_THREADS, open_parquet
from gc2ray.data.store import Store

SID_KEY = "gc2ray.sid"
RUN_KEY = "gc2ray.run"
TOKEN_KEY = "gc2ray.token"  # noqa: S105 - the name of a key
WORKER_KEY = "gc2ray.worker"
ROWS_KEY = "gc2ray.rows"
STATS_KEY = "gc2ray.stats"
WRITTEN_KEY = "gc2ray.written"
"""Keys of a part's schema metadata. They are data on disk: a key never changes with a module."""

_PART_NAME = re.compile(r"data/part-(\d{7})-([0-9a-f]{16})\.parquet")


class Commit(StrEnum):
    """How a commit ended."""

    WON = "won"
    LOST_RACE = "lost_race"


@dataclass(frozen=True)
class PartFooter:
    """What the footer of a part says beside its schema.

    Attributes:
        sid: The shard.
        run: Fingerprint of the recipe.
        token: Unique to the attempt that wrote the part.
        worker: The worker that wrote it.
        rows: Input rows that the part answers.
        stats: Statistics of its answers.
        written: Time of writing; None in parts of versions that did not record it.
    """

    sid: str
    run: str
    token: str
    worker: str
    rows: int
    stats: RunStats
    written: datetime | None = None

    def metadata(self) -> dict[str, str]:
        """The footer as schema metadata."""
        written = {WRITTEN_KEY: self.written.isoformat()} if self.written else {}
        return {
            SID_KEY: self.sid,
            RUN_KEY: self.run,
            TOKEN_KEY: self.token,
            WORKER_KEY: self.worker,
            ROWS_KEY: str(self.rows),
            STATS_KEY: self.stats.to_json(),
            **written,
        }

    @staticmethod
    def from_metadata(metadata: pq.FileMetaData) -> PartFooter:
        """The footer of a Parquet file.

        Raises:
            ValueError: The file is not a part.
            ConfigError: Another version of gc2ray wrote the part, with other columns.
        """
        values = {key.decode(): value for key, value in (metadata.metadata or {}).items()}
        try:
            sid, run, token, worker = (
                values[key].decode() for key in (SID_KEY, RUN_KEY, TOKEN_KEY, WORKER_KEY)
            )
            stats = RunStats.from_json(values[STATS_KEY])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a part's footer: {error}") from error
        version = values.get(SCHEMA_KEY, b"").decode()
        if version != str(SCHEMA_VERSION):
            raise ConfigError(
                f"written by another version of gc2ray (schema {version or 'unknown'}, this one "
                f"has {SCHEMA_VERSION}); choose a new output, or resume with that version"
            )
        if stats.rows != metadata.num_rows:
            raise ValueError(f"{metadata.num_rows} answers, statistics of {stats.rows}")
        # Early parts do not count input rows: each of their rows had one prompt.
        rows = int(values.get(ROWS_KEY, metadata.num_rows))
        written = values.get(WRITTEN_KEY)
        when = datetime.fromisoformat(written.decode()) if written else None
        return PartFooter(sid, run, token, worker, rows, stats, when)

    @property
    def answers(self) -> int:
        """Answer rows of the part: one for each prompt of a row."""
        return self.stats.rows


def in_order(shard: Shard, answers: Iterable[Answer]) -> list[Answer]:
    """A shard's answers by row, then prompt.

    Raises:
        ShardError: A planned row has no answer, a row was not planned, or a prompt is missing.
    """
    by_row: dict[tuple[str, int], list[Answer]] = {row_id: [] for row_id in shard.row_ids()}
    for answer in answers:
        row_id = (answer.request.source, answer.request.row)
        if row_id not in by_row:
            raise ShardError(f"{answer.request.row_key} is answered, but not planned")
        by_row[row_id].append(answer)
    for (source, row), of_row in by_row.items():
        of_row.sort(key=lambda answer: answer.request.prompt_index)
        answered = [answer.request.prompt_index for answer in of_row]
        if not answered:
            raise ShardError(f"{source}#{row} is planned, but was not answered")
        prompts = of_row[0].request.prompt_count
        if answered != list(range(prompts)):
            numbers = ", ".join(map(str, answered))
            raise ShardError(f"{source}#{row} has {prompts} prompts, from 0; answered: {numbers}")
    return [answer for of_row in by_row.values() for answer in of_row]


def part_bytes(
    answers: Sequence[Answer], kept_columns: pa.Schema, provenance: Provenance, footer: PartFooter
) -> bytes:
    """A part as a Parquet file, with its footer."""
    table = answer_table(answers, kept_columns, provenance)
    table = table.cast(answer_schema(kept_columns, footer.metadata()))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def commit_part(store: Store, shard: Shard, part: bytes, token: str) -> Commit:
    """Publish a shard's part.

    Args:
        store: Directory of the round.
        shard: The shard.
        part: A Parquet file whose footer holds `token`.
        token: Unique to this attempt.

    Raises:
        OSError: The part could not be written.
    """
    if store.create(shard.part_name, part):
        return Commit.WON
    is_ours = read_part_footer(store, shard.part_name).token == token
    return Commit.WON if is_ours else Commit.LOST_RACE


def list_parts(store: Store) -> dict[str, str]:
    """Names of the committed parts, by the sid of their shard."""
    matches = [(_PART_NAME.fullmatch(name), name) for name in store.names("data")]
    return {match.group(2): name for match, name in matches if match}


class PlannedParts(NamedTuple):
    """The objects in `data/`, compared with a plan.

    Attributes:
        committed: Whether each shard has a part, (shards,).
        foreign: Names of parts that belong to no planned shard.
        others: Names that are not those of parts.
    """

    committed: Booleans
    foreign: list[str]
    others: list[str]


def planned_parts(store: Store, shards: Shards) -> PlannedParts:
    """Which shards of a plan are committed, by one listing of `data/`."""
    listed = PlannedParts(np.zeros(len(shards), np.bool_), [], [])
    for name in store.names("data"):
        match = _PART_NAME.fullmatch(name)
        index = int(match.group(1)) if match else len(shards)
        if match is None:
            listed.others.append(name)
        elif index < len(shards) and shards.sid(index) == match.group(2):
            listed.committed[index] = True
        else:
            listed.foreign.append(name)
    return listed


def foreign_part(store: Store, name: str) -> ConfigError:
    """The error for a part that does not belong to the run of its directory."""
    return ConfigError(f"{store.uri}: {name} is not a part of this run; move it away")


def read_part_footer(store: Store, name: str) -> PartFooter:
    """The footer of a part.

    Raises:
        ConfigError: The object is not a part, or one of another version.
        OSError: The storage does not answer.
    """
    try:
        return PartFooter.from_metadata(store.metadata(name))
    except ConfigError as error:
        raise ConfigError(f"{store.uri}: {name}: {error}") from error
    except ValueError as error:
        raise ConfigError(
            f"{store.uri}: {name} is not a part that gc2ray wrote; move it away, and rerun"
        ) from error


def read_part_footers(store: Store, names: Sequence[str]) -> list[PartFooter]:
    """The footers of parts, in order.

    Raises:
        ConfigError, OSError: As `read_part_footer`.
    """
    with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
        return list(pool.map(lambda name: read_part_footer(store, name), names))


def read_part(store: Store, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a part, or all of them.

    Raises:
        OSError: The part cannot be read; the message names it.
    """
    chosen = None if columns is None else list(columns)
    try:
        with store.open(name) as handle:
            part = open_parquet(handle, check_pages=True)
            return part.read(columns=chosen, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{store.uri}: {name} cannot be read: {reason}; run `gc2ray verify --deep` to see "
            "whether it is damaged"
        ) from error

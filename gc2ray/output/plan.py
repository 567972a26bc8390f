"""The frozen `Plan` of a run: which rows each shard has.

A plan is made once and stored as a Parquet file with the fingerprint of its recipe; settings that
change later do not alter it. Each extension of a plan has a file of its own (`plan/0001.parquet`,
…), whose shards are numbered from 0, and which holds the digest of the file before it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import Shards, SourceFile, SpanColumns, cut_shards
from gc2ray.data.parquet_footer import open_parquet

PLAN_NAME = "plan/0000.parquet"
"""Name of the first file; `plan_name` has those of extensions."""

_KEPT_COLUMNS = "gc2ray.carried"
"""Key of the schema of kept columns in the metadata of a plan."""
_NAMES = pa.dictionary(pa.int32(), pa.string())
_PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("sid", pa.string()),
        ("source", _NAMES),
        ("fingerprint", _NAMES),
        ("first", pa.int64()),
        ("stop", pa.int64()),
        ("continues", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Plan:
    """Every shard of a run.

    Attributes:
        recipe_fingerprint: Fingerprint of its recipe.
        shards: In order of their index.
        kept_columns: Schema of the input columns that are written back.
    """

    recipe_fingerprint: str
    shards: Shards
    kept_columns: pa.Schema

    @staticmethod
    def cut(
        recipe: Recipe, files: Iterable[SourceFile], shard_rows: int, kept_columns: pa.Schema
    ) -> Plan:
        """The plan of a recipe's input files."""
        fingerprint = recipe.fingerprint()
        return Plan(
            fingerprint,
            Shards.from_shards(cut_shards(files, shard_rows, fingerprint)),
            kept_columns,
        )

    @property
    def rows(self) -> int:
        """Planned rows."""
        return self.shards.rows

    def extended(self, more: Plan) -> Plan:
        """The plan followed by the shards of another plan, with indices that continue.

        Raises:
            ConfigError: The other plan has another recipe, or other kept columns.
        """
        if more.recipe_fingerprint != self.recipe_fingerprint:
            raise ConfigError("an extension of the plan is of another recipe")
        if not more.kept_columns.equals(self.kept_columns):
            raise ConfigError(
                f"recipe.input.keep: kept columns of new files are {_named(more.kept_columns)}, "
                f"those of planned files {_named(self.kept_columns)}; all answers in an output "
                "must have the same"
            )
        return Plan(
            self.recipe_fingerprint, self.shards.followed_by(more.shards), self.kept_columns
        )

    def to_bytes(self, follows: str = "") -> bytes:
        """The plan as a Parquet file; equal plans give equal bytes.

        Args:
            follows: Digest of the file that this plan extends.
        """
        spans, shard = self.shards.spans, pa.array(self.shards.spans.shard)
        sids = pa.array([self.shards.sid(index) for index in range(len(self.shards))], pa.string())
        names = [
            pa.array([file[side] for file in self.shards.files], pa.string()) for side in (0, 1)
        ]
        columns = [
            shard,
            sids.take(shard),
            *(pa.DictionaryArray.from_arrays(spans.file, name) for name in names),
            pa.array(spans.first),
            pa.array(spans.stop),
            pa.array(self.shards.continues).take(shard),
        ]
        metadata = {
            "gc2ray.recipe": self.recipe_fingerprint,
            "gc2ray.follows": follows,
            _KEPT_COLUMNS: base64.b64encode(self.kept_columns.serialize().to_pybytes()).decode(),
        }
        table = pa.table(columns, schema=_PLAN_SCHEMA.with_metadata(metadata))
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        return sink.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """The inverse of `to_bytes`.

        Raises:
            ConfigError: The data is not a plan.
        """
        try:
            table = open_parquet(io.BytesIO(data)).read(use_threads=False)
            metadata = table.schema.metadata
            buffer = pa.py_buffer(base64.b64decode(metadata[_KEPT_COLUMNS.encode()]))
            kept_columns = pa.ipc.read_schema(buffer)
            fingerprint = metadata[b"gc2ray.recipe"].decode()
            shards = _shards(table.cast(_PLAN_SCHEMA).combine_chunks())
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{PLAN_NAME}: not written by gc2ray, or damaged") from error
        return Plan(fingerprint, shards, kept_columns)


def plan_name(number: int) -> str:
    """The name of the plan, 0, or of an extension."""
    return f"plan/{number:04d}.parquet"


def follows(data: bytes) -> str:
    """Digest of the file that a plan file extends; empty if it extends none."""
    try:
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
    except pa.ArrowException:
        return ""
    return str(metadata.get(b"gc2ray.follows", b""), "utf-8")


def _named(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name} {item.type}" for item in schema) or "none"


def _shards(table: pa.Table) -> Shards:
    """The shards of a plan's table."""
    shard, sids, source, fingerprint, first, stop, continues = (
        column.chunk(0) if column.num_chunks else pa.array([], column.type)
        for column in table.columns
    )
    numbers = shard.to_numpy()
    indices, begins = np.unique(numbers, return_index=True)
    if (np.diff(numbers) < 0).any() or not np.array_equal(indices, np.arange(len(indices))):
        raise ValueError("shards are not numbered from 0")
    pairs = np.stack([source.indices.to_numpy(), fingerprint.indices.to_numpy()])
    unique, file = np.unique(pairs, axis=1, return_inverse=True)
    sources, fingerprints = source.dictionary.to_pylist(), fingerprint.dictionary.to_pylist()
    return Shards(
        [(sources[a], fingerprints[b]) for a, b in unique.T],
        SpanColumns(numbers, file, first.to_numpy(), stop.to_numpy()),
        np.array([int(sids[at].as_py(), 16) for at in begins], np.uint64),
        continues.to_numpy(zero_copy_only=False)[begins],
    )

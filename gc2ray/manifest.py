"""The frozen plan of a run, `SourceFile` -> `Span` -> `Shard` -> `Plan`, and the `Run` it is of.

A plan is cut once and stored; nothing is recomputed from a setting afterwards. `Plan` goes to and
from one Parquet file, `Run` to and from `run.json`; both know the recipe by its fingerprint.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray import __version__
from gc2ray.config import Recipe, parse_recipe, recipe_difference
from gc2ray.errors import ConfigError

FORMAT = 1
VERSIONED = ("ray", "torch", "transformers", "pyarrow", "pillow")
PLAN_NAME = "plan/0000.parquet"
RUN_NAME = "run.json"

_PLAN_SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("sid", pa.string()),
        ("source", pa.string()),
        ("fingerprint", pa.string()),
        ("first", pa.int64()),
        ("stop", pa.int64()),
    ]
)


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
    """The unit of hand-out, retry and commit."""

    index: int
    sid: str
    spans: tuple[Span, ...]

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
        return f"data/part-{self.index:07d}-{self.sid}.parquet"


@dataclass(frozen=True)
class Plan:
    """Every shard of a run.

    Attributes:
        recipe_fingerprint: Of the recipe that it was cut for.
        shards: In order of their index.
        carried: Schema of the input columns that are written back.
    """

    recipe_fingerprint: str
    shards: tuple[Shard, ...]
    carried: pa.Schema

    @property
    def rows(self) -> int:
        """Planned rows."""
        return sum(shard.rows for shard in self.shards)

    def to_bytes(self) -> bytes:
        """As a Parquet file, the same bytes for the same plan."""
        records = [
            {"shard": shard.index, "sid": shard.sid, **asdict(span)}
            for shard in self.shards
            for span in shard.spans
        ]
        metadata = {
            "gc2ray.recipe": self.recipe_fingerprint,
            "gc2ray.carried": base64.b64encode(self.carried.serialize().to_pybytes()).decode(),
        }
        schema = _PLAN_SCHEMA.with_metadata(metadata)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(records, schema=schema), sink, compression="zstd")
        return sink.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Plan:
        """The inverse of `to_bytes`.

        Raises:
            ConfigError: Not a plan.
        """
        try:
            table = pq.read_table(io.BytesIO(data))
            metadata = table.schema.metadata
            buffer = pa.py_buffer(base64.b64decode(metadata[b"gc2ray.carried"]))
            carried = pa.ipc.read_schema(buffer)
            fingerprint = metadata[b"gc2ray.recipe"].decode()
            table = table.cast(_PLAN_SCHEMA)
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{PLAN_NAME}: not written by gc2ray, or damaged") from error
        spans: dict[int, list[Span]] = {}
        sids: dict[int, str] = {}
        for record in table.to_pylist():
            index = record.pop("shard")
            sids[index] = record.pop("sid")
            spans.setdefault(index, []).append(Span(**record))
        shards = tuple(Shard(index, sids[index], tuple(spans[index])) for index in sorted(spans))
        return Plan(fingerprint, shards, carried)


@dataclass(frozen=True)
class Run:
    """What `run.json` says: recipe, plan, versions."""

    recipe: Recipe
    plan_digest: str
    shards: int
    rows: int
    versions: dict[str, str]
    format: int = FORMAT

    @staticmethod
    def of(recipe: Recipe, plan: Plan, plan_data: bytes) -> Run:
        """The run of a stored plan, with this process's versions."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        versions |= {"gc2ray": __version__, "python": sys.version.split()[0]}
        return Run(recipe, digest(plan_data), len(plan.shards), plan.rows, versions)

    def to_bytes(self) -> bytes:
        """As JSON, for people too."""
        content: dict[str, Any] = {
            "format": self.format,
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_fingerprint": self.recipe.fingerprint(),
            "plan": {"file": PLAN_NAME, "sha256": self.plan_digest},
            "shards": self.shards,
            "rows": self.rows,
            "versions": self.versions,
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Run:
        """The inverse of `to_bytes`.

        Raises:
            ConfigError: Not a run of this version.
        """
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise ConfigError(f"{RUN_NAME}: format {content['format']}, this reads {FORMAT}")
            return Run(
                recipe=parse_recipe(content["recipe"]),
                plan_digest=content["plan"]["sha256"],
                shards=content["shards"],
                rows=content["rows"],
                versions=content["versions"],
            )
        except (ValueError, KeyError, TypeError) as error:  # not JSON, or not ours
            raise ConfigError(f"{RUN_NAME}: not written by gc2ray, or damaged") from error

    def check(self, recipe: Recipe) -> None:
        """Refuse another recipe.

        Raises:
            ConfigError: Names every setting that differs.
        """
        lines = recipe_difference(self.recipe, recipe)
        if lines:
            raise ConfigError(
                "the output directory belongs to another recipe; choose a new output, or go back "
                "to the stored settings:\n  " + "\n  ".join(lines)
            )


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


def first_spans(files: Sequence[SourceFile], rows: int) -> list[Span]:
    """Spans of the first `rows` rows of the input, or of all there are."""
    spans: list[Span] = []
    for file in files:
        stop = min(rows, file.rows)
        if stop > 0:
            spans.append(Span(file.source, file.fingerprint, 0, stop))
            rows -= stop
    return spans


def cut_shards(files: Sequence[SourceFile], shard_rows: int, recipe: Recipe) -> tuple[Shard, ...]:
    """Cut files into shards of about `shard_rows` rows, at row-group borders where possible."""
    fingerprint = recipe.fingerprint()
    shards: list[Shard] = []
    pending: list[Span] = []

    def close() -> None:
        if pending:
            spans = tuple(pending)
            shards.append(Shard(len(shards), _sid(fingerprint, spans), spans))
            pending.clear()

    for piece in _pieces(files, shard_rows):
        if sum(span.rows for span in pending) + piece.rows > shard_rows:
            close()
        if pending and pending[-1].source == piece.source:
            pending[-1] = replace(pending[-1], stop=piece.stop)
        else:
            pending.append(piece)
    close()
    return tuple(shards)


def _pieces(files: Sequence[SourceFile], shard_rows: int) -> Iterator[Span]:
    """Row groups, those above `shard_rows` in near-equal parts."""
    for file in files:
        first = 0
        for rows in file.groups:
            parts = max(1, -(-rows // shard_rows))
            cuts = [first + rows * part // parts for part in range(parts + 1)]
            for start, stop in itertools.pairwise(cuts):
                if stop > start:
                    yield Span(file.source, file.fingerprint, start, stop)
            first += rows


def _sid(recipe_fingerprint: str, spans: Sequence[Span]) -> str:
    identity = json.dumps([recipe_fingerprint, *(asdict(span) for span in spans)])
    return digest(identity.encode())[:16]

"""The latest answers of an output as a plain dataset: few files, in input order, `_SUCCESS` last.

Each file is written to a temporary folder on this machine and then created under its final name in
one step, so a half-written file is never visible. Memory holds one part of each round and one row
group. A dataset without `_SUCCESS` is incomplete: delete it and start again.

Not covered: resuming an interrupted `compact`; partitions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.arguments import as_tuple, check_count
from gc2ray.core.config.locations import Location, as_location
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.schema import answer_schema
from gc2ray.core.version import __version__
from gc2ray.data.store import Store, json_bytes
from gc2ray.output.latest import MERGED_BY
from gc2ray.output.run_directory import Round
from gc2ray.output.verify import Verdict, verify

FILE_BYTES = 512 << 20
ROW_GROUP_BYTES = 64 << 20
"""In memory; compressed it is less."""
SUCCESS_NAME = "_SUCCESS"


@dataclass(frozen=True)
class DataFile:
    """A file of the dataset.

    Attributes:
        name: Name of the file, relative to the dataset.
        answers: Number of answer rows.
        failed: Number of answer rows that are not `ok`.
        bytes: Size of the file.
        sha256: Digest of its content.
    """

    name: str
    answers: int
    failed: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """A dataset that was written; `_SUCCESS` holds the same fields.

    Attributes:
        rows: Number of input rows.
        answers: Number of answer rows.
        failed: Number of answer rows that are not `ok`.
        files: Its files, in input order.
        run: Fingerprint of the recipe.
        rounds: The rounds whose answers it holds.
        version: Version of gc2ray that wrote it.
    """

    rows: int
    answers: int
    failed: int
    files: tuple[DataFile, ...]
    run: str
    rounds: tuple[int, ...]
    version: str = __version__


def compact(
    output: str, destination: str, *, file_bytes: int = FILE_BYTES, incomplete: bool = False
) -> Dataset:
    """Write the latest answers of an output as a dataset.

    Args:
        output: Directory or URL of the run.
        destination: Directory or URL of the dataset; empty, or not there yet.
        file_bytes: Size at which a file ends, with the row group that reaches it.
        incomplete: Write the dataset even if some rows are not answered, without those rows.

    Raises:
        ConfigError: There is no run, it is damaged or incomplete, the destination is taken, or
            `file_bytes` is out of range.
        OSError: The storage does not answer.
    """
    check_count("file_bytes", file_bytes, 1)
    store, target = Store(output), Store(destination)
    if store.holds(target):
        raise ConfigError(f"{destination}: lies inside {output}; choose a destination outside it")
    verdict = verify(output)
    verdict.raise_if_damaged(output)
    if verdict.missing and not incomplete:
        raise ConfigError(
            f"{output}: {verdict.missing[0]}; pass --incomplete to export only the answered rows"
        )
    _check_empty(target)
    first = verdict.rounds[0].round
    files = tuple(_write(_answers(verdict), _schema(first), target, file_bytes))
    dataset = Dataset(
        rows=verdict.rows,
        answers=sum(file.answers for file in files),
        failed=sum(file.failed for file in files),
        files=files,
        run=first.plan.recipe_fingerprint,
        rounds=tuple(checked.round.number for checked in verdict.rounds),
    )
    record = json_bytes(asdict(dataset))
    if not target.create(SUCCESS_NAME, record):
        _check_own(target, SUCCESS_NAME, hashlib.sha256(record).hexdigest())
    target.tidy()
    return dataset


def read_answers(output: Location, columns: str | Sequence[str] | None = None) -> pa.Table:
    """Read the latest answers of an output over all its retry rounds, in input order.

    Args:
        output: Directory or URL of a run, which may be incomplete.
        columns: Names of the columns; none: all of them.

    Returns:
        A row for each prompt that was answered: the `ok` answer where there is one, of equals the
        one of the latest round.

    Raises:
        ConfigError: There is no run, it is damaged, or it has no such column.

    Example:
        >>> table = gc2ray.read_answers("out", ["row_key", "status", "answer"])
        >>> table.num_rows, set(table["status"].to_pylist())
        (6, {'ok'})
    """
    output = as_location("OUTPUT", output)
    return answers_table(output, verify(output), as_tuple(columns))


def answers_table(output: str, verdict: Verdict, columns: Sequence[str]) -> pa.Table:
    """`read_answers` of an output that has been verified."""
    verdict.raise_if_damaged(output)
    schema = _schema(verdict.rounds[0].round).remove_metadata()
    names = list(columns) or schema.names
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise ConfigError(
            f"{output}: has no column {missing[0]!r}; input columns are written back if "
            "recipe.input.keep names them"
        )
    tables = _answers(verdict, list(dict.fromkeys([*names, *MERGED_BY])))
    selected = [table.select(names).replace_schema_metadata() for table in tables]
    return pa.concat_tables(selected) if selected else schema.empty_table().select(names)


def _check_empty(target: Store) -> None:
    target.check_usable(writing=False)
    names = target.names("")
    if f"/{SUCCESS_NAME}" in names:
        raise ConfigError(f"{target.uri}: holds a finished dataset; choose another destination")
    if names:
        raise ConfigError(
            f"{target.uri}: is not empty, and has no {SUCCESS_NAME}; choose another destination, "
            "or delete it if an interrupted compact left it"
        )
    target.check_usable(writing=True)


def _check_own(target: Store, name: str, sha256: str) -> None:
    """Accept a name that is taken if the content is ours: only the acknowledgement was lost.

    Raises:
        ConfigError: Another writer created it.
    """
    if target.sha256(name) != sha256:
        raise ConfigError(
            f"{target.uri}: {name} exists with other content; another process writes here too"
        )


def _schema(first: Round) -> pa.Schema:
    """The parts' schema; its metadata describes the run instead of a part."""
    recipe = json.dumps(first.run.recipe.model_dump(mode="json"))
    about = {"gc2ray.run": first.plan.recipe_fingerprint, "gc2ray.recipe": recipe}
    return answer_schema(first.plan.kept_columns, about)


def _answers(verdict: Verdict, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The latest answers, in input order; columns as for `Latest.answers`."""
    latest = verdict.latest()
    for index in range(len(verdict.rounds[0].committed)):
        table = latest.answers(index, columns)
        if table is not None:
            yield table


def _row_groups(
    tables: Iterable[pa.Table], schema: pa.Schema, size_bytes: int
) -> Iterator[pa.Table]:
    """The same rows in tables of about `size_bytes` in memory; the last may be smaller."""
    held: list[pa.Table] = []
    held_bytes = 0
    for table in tables:
        rows = max(1, len(table) * size_bytes // max(1, table.nbytes))
        for start in range(0, len(table), rows):
            piece = table.slice(start, rows).replace_schema_metadata(schema.metadata)
            held.append(piece)
            held_bytes += piece.nbytes
            if held_bytes >= size_bytes:
                yield pa.concat_tables(held)
                held, held_bytes = [], 0
    if held:
        yield pa.concat_tables(held)


def _write(
    tables: Iterable[pa.Table], schema: pa.Schema, target: Store, file_bytes: int
) -> Iterator[DataFile]:
    """Write files until the tables are used up; at least one file, so that the schema is kept."""
    groups = _row_groups(tables, schema, min(ROW_GROUP_BYTES, file_bytes))
    with tempfile.TemporaryDirectory(prefix="gc2ray-") as folder:
        following = next(groups, schema.empty_table())
        for number in itertools.count():
            path = Path(folder) / f"part-{number:05d}.parquet"
            answers, failed = _fill(path, itertools.chain([following], groups), file_bytes)
            with path.open("rb") as handle:
                sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
            size = path.stat().st_size
            if not target.create_from(path.name, path):
                _check_own(target, path.name, sha256)
            path.unlink()
            yield DataFile(path.name, answers, failed, size, sha256)
            following = next(groups, None)
            if following is None:
                return


def _fill(path: Path, groups: Iterator[pa.Table], file_bytes: int) -> tuple[int, int]:
    """Write row groups until a file is large enough; return its answer rows and how many failed."""
    answers = failed = 0
    first = next(groups)
    with (
        path.open("wb") as handle,
        pq.ParquetWriter(
            handle, first.schema, compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        for table in itertools.chain([first], groups):
            writer.write_table(table, row_group_size=max(1, len(table)))
            answers += len(table)
            failed += len(table) - table["status"].to_pylist().count(Status.OK)
            if handle.tell() >= file_bytes:
                break
    return answers, failed

"""Rows from Parquet files: a file, a directory or a glob, local or on any fsspec filesystem.

Planning lists once and reads footers only. Reading streams small batches of the needed columns and
never a whole row group. A file that changed since it was planned is an error, not a mixture.

What a reader must hold is one page of each column and its dictionary. Files with pages of about a
megabyte cost little, whatever their row groups; pyarrow's defaults put up to 1,024 values into a
page and images into a dictionary, and cost as much as such a page (measured: 411 MiB for a group of
300 MB of 100 KB images, 12 to 63 MiB with pages of 1 MB: `write_batch_size=8,
use_dictionary=False`).

Not covered: several images in a row; row groups that start in the middle of a span are read from
their beginning and the rows before the span are dropped.
"""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.config import InputConfig
from gc2ray.errors import STORAGE_ERRORS, BadRow, ConfigError, ShardError, Status
from gc2ray.footer import read_footer
from gc2ray.prompts import PromptSource
from gc2ray.records import ImageRef, Request
from gc2ray.shards import SourceFile, Span, digest, row_key

FOOTER_THREADS = 16
MAX_BATCH_ROWS = 256
READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetSource:
    """The input of a recipe.

    Attributes:
        config: Where it is and which columns it has.
    """

    config: InputConfig

    def scan(self) -> tuple[list[SourceFile], pa.Schema]:
        """Every file in order of name, and the schema of the columns that are written back.

        Raises:
            ConfigError: There are no files, one cannot be read, or columns are missing.
        """
        filesystem, root, found = self._listing()
        if not found:
            raise ConfigError(f"recipe.input.uri: no Parquet files at {self.config.uri}")
        first = self._schema(filesystem, found[0])
        _check_columns(first, self.config)
        _check_types(first, self.config)
        schema = pa.schema([first.field(name) for name in self.config.columns()])

        def footer(path: str) -> SourceFile:
            source = posixpath.relpath(path, root)
            with filesystem.open(path, "rb") as handle:
                file = pq.ParquetFile(handle)
                _check_same(schema, file.schema_arrow, self.config, source)
                metadata = file.metadata
                groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            return SourceFile(source, _fingerprint(filesystem, path), tuple(groups))

        try:
            with ThreadPoolExecutor(FOOTER_THREADS, "gc2ray-footer") as pool:
                files = list(pool.map(footer, found))
        except (*STORAGE_ERRORS, pa.ArrowException) as error:
            raise ConfigError(f"recipe.input.uri: an input file cannot be read: {error}") from error
        carried = [schema.field(name).with_nullable(nullable=True) for name in self.config.keep]
        return files, pa.schema(carried)

    @staticmethod
    def _schema(filesystem: Any, path: str) -> pa.Schema:
        try:
            with filesystem.open(path, "rb") as handle:
                return pq.ParquetFile(handle).schema_arrow
        except (*STORAGE_ERRORS, pa.ArrowException) as error:
            raise ConfigError(f"recipe.input.uri: {path} cannot be read: {error}") from error

    def read(self, span: Span, host_memory_bytes: int) -> Iterator[Request]:
        """The requests of a span in order: at least one per row, one for each of its prompts.

        Args:
            span: What to read.
            host_memory_bytes: About how much undecoded input may be held at a time.

        Raises:
            ShardError: The file is gone, changed, or damaged.
        """
        filesystem, root, _ = self._located()
        path = posixpath.normpath(posixpath.join(root, span.source))
        try:
            _check_unchanged(filesystem, path, span)
            with filesystem.open(path, "rb") as handle:
                yield from self._rows(handle, span, host_memory_bytes)
            _check_unchanged(filesystem, path, span)  # or parts of two files may have been read
        except (*STORAGE_ERRORS, pa.ArrowException) as error:
            raise ShardError(f"{span.source}: {error}") from error

    def _rows(self, handle: Any, span: Span, host_memory_bytes: int) -> Iterator[Request]:
        file = pq.ParquetFile(handle, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        groups, row = _groups_of(file.metadata, span)
        columns = list(self.config.columns())
        prompt = self.config.prompt.source()
        batches = file.iter_batches(
            batch_size=_batch_rows(file.metadata, groups, columns, host_memory_bytes),
            row_groups=groups,
            columns=columns,
            use_threads=False,
        )
        for batch in batches:
            inside = batch.slice(min(len(batch), max(0, span.first - row)))
            row = max(row, span.first) if len(inside) else row + len(batch)
            for index in range(len(inside)):
                if row >= span.stop:
                    return
                record = {name: inside.column(name)[index] for name in columns}
                yield from self._requests(prompt, span.source, row, record)
                row += 1
        if row < span.stop:
            raise ShardError(f"{span.source} ends at row {row}, planned to {span.stop}")

    def _requests(
        self, prompt: PromptSource, source: str, row: int, record: Mapping[str, pa.Scalar]
    ) -> Iterator[Request]:
        """One row; kept columns stay Arrow scalars, so that they come out as they went in."""
        images: tuple[ImageRef, ...] = ()
        trouble: BadRow | None = None
        try:
            images = (_image(_value(record, self.config.image, Status.BAD_IMAGE)),)
        except BadRow as error:
            trouble = error
        carried = {name: record[name] for name in self.config.keep if record[name].is_valid}
        listed = prompt.column is not None and _is_list(record[prompt.column].type)
        texts = list(_texts(prompt, record)) if listed else [_text(prompt, record)]
        for index, text in enumerate(texts):
            fault = text if isinstance(text, BadRow) else None
            if trouble is not None:  # a new one each, because raising an exception changes it
                fault = BadRow(trouble.status, trouble.message)
            yield Request(
                row_key=row_key(source, row, index if listed else None),
                source=source,
                row=row,
                images=images,
                prompts=(text,) if isinstance(text, str) and fault is None else (),
                carried=carried,
                fault=fault,
                prompt_index=index,
                prompt_count=len(texts),
            )

    def _located(self) -> tuple[Any, str, str]:
        """Filesystem, input root, and the path or pattern asked for."""
        try:
            filesystem, path = fsspec.core.url_to_fs(self.config.uri)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"recipe.input.uri: {error}") from error
        if "*" in path or "?" in path:
            fixed = path[: min(path.find(mark) for mark in "*?" if mark in path)]
            return filesystem, posixpath.dirname(fixed), path
        is_file = path.endswith(".parquet") and not filesystem.isdir(path)
        return filesystem, posixpath.dirname(path) if is_file else path.rstrip("/"), path

    def _listing(self) -> tuple[Any, str, list[str]]:
        filesystem, root, path = self._located()
        try:
            if "*" in path or "?" in path:
                found = filesystem.glob(path)
            elif root != path.rstrip("/"):
                found = [path] if filesystem.exists(path) else []
            else:
                found = filesystem.find(path)
        except FileNotFoundError:
            found = []
        except STORAGE_ERRORS as error:
            raise ConfigError(f"recipe.input.uri: {self.config.uri}: {error}") from error
        names = [name for name in found if name.endswith(".parquet")]
        if found != [path]:  # a file that is named is meant, whatever its name
            names = [name for name in names if not _hidden(name, root)]
        return filesystem, root, sorted(names)


def _hidden(path: str, root: str) -> bool:
    parts = posixpath.relpath(path, root).split("/")
    return any(part.startswith(("_", ".")) for part in parts)


def _check_unchanged(filesystem: Any, path: str, span: Span) -> None:
    if _fingerprint(filesystem, path) != span.fingerprint:
        raise ShardError(f"{span.source} changed since the run was planned")


def _fingerprint(filesystem: Any, path: str) -> str:
    """The store's ETag; without one, size, time of change and a digest of the footer."""
    info = filesystem.info(path)
    if info.get("ETag"):
        return f"etag:{info['ETag']}".replace('"', "")
    with filesystem.open(path, "rb") as handle:
        footer = digest(read_footer(handle))[:16]
    changed = info.get("mtime") or info.get("LastModified") or info.get("created") or ""
    return f"size:{int(info['size'])} changed:{changed} footer:{footer}"


def _groups_of(metadata: Any, span: Span) -> tuple[list[int], int]:
    """Row groups that hold the span, and the first row of the first of them."""
    groups: list[int] = []
    start, first = 0, 0
    for index in range(metadata.num_row_groups):
        stop = start + metadata.row_group(index).num_rows
        if start < span.stop and stop > span.first:
            if not groups:
                first = start
            groups.append(index)
        start = stop
    return groups, first


def _batch_rows(
    metadata: Any, groups: Sequence[int], columns: Sequence[str], host_memory_bytes: int
) -> int:
    """Rows whose columns fill an eighth of the budget.

    Arrow holds two batches while one follows the other, its buffers grow by doubling, and Python
    and the engine hold copies of rows.
    """
    total, rows = 0, 0
    for index in groups:
        group = metadata.row_group(index)
        rows += group.num_rows
        for column in range(group.num_columns):
            chunk = group.column(column)
            path = chunk.path_in_schema
            if any(path == name or path.startswith(f"{name}.") for name in columns):
                total += chunk.total_uncompressed_size
    per_row = max(1, total // max(1, rows))
    return max(1, min(MAX_BATCH_ROWS, host_memory_bytes // 8 // per_row))


def _value(record: Mapping[str, pa.Scalar], name: str, status: Status) -> object:
    """A cell as Python has it.

    Raises:
        BadRow: Python cannot have it: text that is not UTF-8, a date out of range.
    """
    try:
        return record[name].as_py()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        raise BadRow(status, f"column {name!r} cannot be read: {error}") from error


def _texts(prompt: PromptSource, record: Mapping[str, pa.Scalar]) -> Iterator[str | BadRow]:
    """The prompts of a row with a list of them: at least one, so that no row is lost."""
    name = str(prompt.column)
    prompts = record[name].values
    if not prompts:
        problem = "is null" if prompts is None else "holds no prompt"
        yield BadRow(Status.BAD_PROMPT, f"prompt column {name!r} {problem}")
        return
    for index, element in enumerate(prompts):
        if element.is_valid:
            yield _text(prompt, {name: element})
        else:
            yield BadRow(Status.BAD_PROMPT, f"prompt {index} in column {name!r} is null")


def _text(prompt: PromptSource, record: Mapping[str, pa.Scalar]) -> str | BadRow:
    """The text of a prompt, or why there is none."""
    try:
        values = {name: _value(record, name, Status.BAD_PROMPT) for name in prompt.columns()}
        return prompt.render(values)
    except BadRow as error:
        return error


def _image(cell: object) -> ImageRef:
    """An image cell: struct of bytes and path, bytes, or a path; anything else is no image."""
    if isinstance(cell, Mapping):
        return ImageRef(data=cell.get("bytes"), path=cell.get("path"))
    if isinstance(cell, bytes):
        return ImageRef(data=cell)
    if isinstance(cell, str):
        return ImageRef(path=cell)
    return ImageRef()


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return bool(lists or pa.types.is_fixed_size_list(kind))


def _is_prompt(kind: pa.DataType) -> bool:
    return _is_text(kind) or (_is_list(kind) and _is_text(kind.value_type))


def _check_columns(schema: pa.Schema, config: InputConfig) -> None:
    for name in config.columns():
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(schema.names)}"
            raise ConfigError(f"recipe.input: no column {name!r} in the input; {hint}")
        if schema.names.count(name) > 1:
            raise ConfigError(f"recipe.input: the input has several columns {name!r}")


def _check_types(schema: pa.Schema, config: InputConfig) -> None:
    kind = schema.field(config.image).type
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    struct = pa.types.is_struct(kind) and any(f.name in ("bytes", "path") for f in kind)
    if not (binary or struct or _is_text(kind)):
        raise ConfigError(
            f"recipe.input.image: column {config.image!r} is {kind}; expected a struct of bytes "
            "and path, binary, or a path"
        )
    column = config.prompt.column
    if column is not None and not _is_prompt(schema.field(column).type):
        kind = schema.field(column).type
        raise ConfigError(
            f"recipe.input.prompt.column: column {column!r} is {kind}; expected string, or "
            "list<string> for several prompts per image"
        )


def _check_same(expected: pa.Schema, found: pa.Schema, config: InputConfig, source: str) -> None:
    for item in expected:
        index = found.get_field_index(item.name)
        if index < 0:
            raise ConfigError(f"recipe.input: {source} has no column {item.name!r}")
        if item.name in config.keep and found.field(index).type != item.type:
            raise ConfigError(
                f"recipe.input.keep: column {item.name!r} is {found.field(index).type} in {source} "
                f"and {item.type} in the first file"
            )

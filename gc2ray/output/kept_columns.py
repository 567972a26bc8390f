"""Kept columns: which types they have once they were written to a part and read back.

Parquet does not have every type of Arrow. Some types come back as another type, and some cannot be
written at all. A plan carries the types that come back, so that parts have the planned schema; a
column that cannot be written is refused before any row is answered.

Not covered: single values that do not fit, such as a time in seconds too large for milliseconds.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from gc2ray.core.errors import ConfigError, Status, first_line
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.data.parquet_footer import open_parquet
from gc2ray.output.parts import PartFooter, part_bytes

ROUNDS = 4
"""Most times that a type is written and read until it comes back unchanged; two usually do."""

_ERRORS = (pa.ArrowException, ValueError, TypeError, NotImplementedError, OSError)


def as_written(kept_columns: pa.Schema) -> pa.Schema:
    """Kept columns with the types that they have in parts.

    Args:
        kept_columns: The same columns with the types that they have in the input.

    Raises:
        ConfigError: A column cannot be written; the message names it and its type.
    """
    return pa.schema([_written(item) for item in kept_columns])


def _written(item: pa.Field) -> pa.Field:
    try:
        cells = [_cell(item.type), None]
        field = _through_parquet(item, cells)
        for _ in range(ROUNDS):
            again = _through_parquet(field, cells)
            if again.equals(field):
                return pa.field(item.name, field.type)
            field = again
    except _ERRORS as error:
        raise _unwritable(item, first_line(error)) from error
    raise _unwritable(item, "its type changes each time that it is written and read")


def _unwritable(item: pa.Field, why: str) -> ConfigError:
    return ConfigError(
        f"recipe.input.keep: column {item.name!r} is {item.type}, which cannot be written to "
        f"Parquet ({why}); do not keep it, or cast it in the input"
    )


def _through_parquet(item: pa.Field, cells: list[pa.Scalar | None]) -> pa.Field:
    """The type with which a column comes back from a part, with rows or without any."""
    kept_columns = pa.schema([item])
    fields = []
    for some in (cells, []):
        answers = [_answer(item.name, row, cell) for row, cell in enumerate(some)]
        footer = PartFooter("0" * 16, "", "", "", len(some), stats_of(answers))
        data = pa.BufferReader(part_bytes(answers, kept_columns, Provenance(0, 0, ""), footer))
        field = pq.read_schema(data).field(item.name)
        data.seek(0)
        table = open_parquet(data).read([item.name], use_threads=False)
        rows = pa.array(range(len(some)), pa.int64())
        column = pa.concat_tables([table, table]).take(rows).column(0)  # as `Latest` does
        if not field.type.equals(column.type) or column.null_count != some.count(None):
            raise ValueError("it is not read as it was written")
        fields.append(field)
    if not fields[0].equals(fields[1]):
        raise ValueError(f"it is read as {fields[0].type} with rows, as {fields[1].type} without")
    return fields[0]


def _answer(name: str, row: int, cell: pa.Scalar | None) -> Answer:
    kept_columns = {} if cell is None else {name: cell}
    request = Request(f"#{row}", "", row, images=(), prompts=(), kept_columns=kept_columns)
    return Answer(request, Status.FAILED, "", 1.0)


def _cell(kind: pa.DataType) -> pa.Scalar | None:
    """A value of a type; None for the null type."""
    return None if types.is_null(kind) else _one(kind)[0]


def _one(kind: pa.DataType) -> pa.Array:
    """An array with one value of a type.

    Raises:
        pa.ArrowException, ValueError, TypeError: Arrow cannot make one.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _one(kind.storage_type))
    if types.is_dictionary(kind):
        return pa.DictionaryArray.from_arrays(
            pa.array([0], kind.index_type), _one(kind.value_type), ordered=kind.ordered
        )
    if types.is_run_end_encoded(kind):
        ends = pa.array([1], kind.run_end_type)
        return pa.RunEndEncodedArray.from_arrays(ends, _one(kind.value_type))
    if types.is_nested(kind):
        return _one_nested(kind)
    return _one_plain(kind)


def _one_nested(kind: pa.DataType) -> pa.Array:
    if types.is_struct(kind):
        if not kind.num_fields:
            return pa.array([{}], kind)
        return pa.StructArray.from_arrays([_one(item.type) for item in kind], fields=list(kind))
    if types.is_map(kind):
        pairs = [_one(kind.key_type), _one(kind.item_type)]
        return pa.MapArray.from_arrays([0, 1], *pairs).cast(kind)
    if types.is_union(kind):
        raise ValueError("a union")
    if types.is_fixed_size_list(kind):
        if not kind.list_size:
            raise ValueError("lists of no elements")  # Arrow's writer ends the process
        values = [_one(kind.value_type)] * kind.list_size
        return pa.FixedSizeListArray.from_arrays(pa.concat_arrays(values), type=kind)
    value = _one(kind.value_type)
    if types.is_list_view(kind) or types.is_large_list_view(kind):
        array = pa.ListViewArray if types.is_list_view(kind) else pa.LargeListViewArray
        return array.from_arrays([0], [1], value, type=kind)
    array = pa.LargeListArray if types.is_large_list(kind) else pa.ListArray
    return array.from_arrays([0, 1], value, type=kind)


def _one_plain(kind: pa.DataType) -> pa.Array:
    if types.is_null(kind):
        return pa.nulls(1)
    if types.is_primitive(kind) or types.is_fixed_size_binary(kind) or types.is_decimal(kind):
        zeros = pa.py_buffer(bytes(max(1, kind.bit_width // 8)))
        return pa.Array.from_buffers(kind, 1, [None, zeros])
    if types.is_interval(kind):
        return pa.array([(1, 1, 1)], kind)
    return pa.array([b""], pa.binary()).cast(kind)

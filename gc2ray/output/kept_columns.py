"""Kept columns, tried the whole way into a part and back before anything is answered.

Parquet has not every type of Arrow: some come back as another one, some cannot be written at all.
A plan carries columns as they come back, so that parts are what was planned; a column that cannot
be written is refused.

Not covered: single values that do not fit, as a time in seconds that milliseconds cannot count to.
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
"""After so many, at most, a type comes back as itself; two are the rule."""

_ERRORS = (pa.ArrowException, ValueError, TypeError, NotImplementedError, OSError)


def as_written(carried: pa.Schema) -> pa.Schema:
    """Kept columns with the types that they have in parts.

    Args:
        carried: With the types that they have in the input.

    Raises:
        ConfigError: One cannot be written; the message names it, and its type.
    """
    return pa.schema([_written(item) for item in carried])


def _written(item: pa.Field) -> pa.Field:
    try:
        cells = [_cell(item.type), None]
        found = _through_parquet(item, cells)
        for _ in range(ROUNDS):
            again = _through_parquet(found, cells)
            if again.equals(found):
                return pa.field(item.name, found.type)
            found = again
    except _ERRORS as error:
        raise _unwritable(item, first_line(error)) from error
    raise _unwritable(item, "it comes back as another type each time")


def _unwritable(item: pa.Field, why: str) -> ConfigError:
    return ConfigError(
        f"recipe.input.keep: column {item.name!r} is {item.type}, which cannot be written to "
        f"Parquet ({why}); do not keep it, or cast it in the input"
    )


def _through_parquet(item: pa.Field, cells: list[pa.Scalar | None]) -> pa.Field:
    """A column as it comes back from a part with some cells, and from one without rows."""
    carried = pa.schema([item])
    fields = []
    for some in (cells, []):
        answers = [_answer(item.name, row, cell) for row, cell in enumerate(some)]
        footer = PartFooter("0" * 16, "", "", "", len(some), stats_of(answers))
        data = pa.BufferReader(part_bytes(answers, carried, Provenance(0, 0, ""), footer))
        told = pq.read_schema(data).field(item.name)
        data.seek(0)
        table = open_parquet(data).read([item.name], use_threads=False)
        rows = pa.array(range(len(some)), pa.int64())
        column = pa.concat_tables([table, table]).take(rows).column(0)  # as is done after retries
        if not told.type.equals(column.type) or column.null_count != some.count(None):
            raise ValueError("it does not come back as it was written")
        fields.append(told)
    if not fields[0].equals(fields[1]):
        raise ValueError(f"it comes back as {fields[0].type}, or as {fields[1].type}")
    return fields[0]


def _answer(name: str, row: int, cell: pa.Scalar | None) -> Answer:
    carried = {} if cell is None else {name: cell}
    request = Request(f"#{row}", "", row, images=(), prompts=(), carried=carried)
    return Answer(request, Status.FAILED, "", 1.0)


def _cell(kind: pa.DataType) -> pa.Scalar | None:
    """Some value of a type; None of one that has none."""
    return None if types.is_null(kind) else _one(kind)[0]


def _one(kind: pa.DataType) -> pa.Array:
    """An array with one value of a type.

    Raises:
        pa.ArrowException, ValueError, TypeError: Arrow has no way to make one.
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

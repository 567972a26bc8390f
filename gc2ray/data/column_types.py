"""Which Arrow types columns may have: as text, as prompts, as images, in templates; and in common.

Types are judged by what a cell of them is to Python: text in a dictionary or a view is text. A
column without a value, of type null, may be anything.

Not covered: extension types other than as kept columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pyarrow import types

_LISTS = (
    types.is_list,
    types.is_large_list,
    types.is_fixed_size_list,
    types.is_list_view,
    types.is_large_list_view,
)
_PLAIN = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)


def is_text(kind: pa.DataType) -> bool:
    """Whether cells are text."""
    kind = _value_of(kind)
    strings = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(strings or types.is_null(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether cells are lists."""
    return any(test(kind) for test in _LISTS)


def is_prompt(kind: pa.DataType) -> bool:
    """Whether cells are a prompt, or a list of them."""
    return is_text(kind) or (is_list(kind) and is_text(kind.value_type))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether cells are bytes."""
    kind = _value_of(kind)
    fixed = types.is_fixed_size_binary(kind) or types.is_null(kind)
    binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return bool(fixed or binary)


def is_image(kind: pa.DataType) -> bool:
    """Whether cells are images: a struct of bytes and path, or one of them; bytes; or a path.

    Or lists of such.
    """
    if is_list(kind):
        return not is_list(kind.value_type) and is_image(kind.value_type)
    if not types.is_struct(kind):
        return is_bytes(kind) or is_text(kind)
    fields = {item.name: item.type for item in kind}
    known = [is_bytes(fields["bytes"])] if "bytes" in fields else []
    known += [is_text(fields["path"])] if "path" in fields else []
    return bool(known) and all(known)


def carries_bytes(kind: pa.DataType) -> bool:
    """Whether images can be in the cells themselves, and are not only named by a path."""
    if is_list(kind):
        return carries_bytes(kind.value_type)
    return is_bytes(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def reads_as_text(kind: pa.DataType) -> bool:
    """Whether a cell in a template reads as it should: text, numbers, truth, times."""
    kind = _value_of(kind)
    return is_text(kind) or types.is_temporal(kind) or any(test(kind) for test in _PLAIN)


def in_common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that has the values of both, exactly; None where there is none."""
    if one.equals(other):
        return one
    if types.is_null(one) or types.is_null(other):
        return other if types.is_null(one) else one
    if types.is_dictionary(one) or types.is_dictionary(other):
        return _in_dictionaries(one, other)
    if types.is_struct(one) and types.is_struct(other):
        return _in_structs(one, other)
    if is_list(one) and is_list(other):
        return _in_lists(one, other)
    return _of_one_kind(one, other)


def holds(planned: pa.Schema, actual: pa.Schema) -> bool:
    """Whether columns have the values of others of the same names, exactly."""
    if planned.names != actual.names:
        return False
    pairs = zip(planned.types, actual.types, strict=True)
    return all(in_common(own, other) == own for own, other in pairs)


def sturdy(kind: pa.DataType) -> pa.DataType:
    """The type that has the same values in any number of files, and in whatever is done with them.

    A dictionary has room for all files' values. Arrow cannot take rows of views, nor read
    dictionaries within lists and structs over row groups; these are their values.
    """
    if types.is_dictionary(kind):
        index = max(kind.index_type, pa.int32(), key=lambda kind: kind.bit_width)
        return pa.dictionary(index, _plain(kind.value_type), kind.ordered)
    return _plain(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.string() if types.is_string_view(kind) else pa.binary()
    if types.is_struct(kind):
        return pa.struct([item.with_type(_plain(item.type)) for item in kind])
    if is_list(kind) and _plain(kind.value_type) != kind.value_type:
        value = kind.value_field.with_type(_plain(kind.value_type))
        return pa.large_list(value) if types.is_large_list(kind) else pa.list_(value)
    return kind


def _of_one_kind(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    if is_text(one) and is_text(other):
        return pa.large_string() if pa.large_string() in (one, other) else pa.string()
    if is_bytes(one) and is_bytes(other):
        return pa.large_binary() if pa.large_binary() in (one, other) else pa.binary()
    if types.is_integer(one) and types.is_integer(other):
        return _wider_integer(one, other)
    if types.is_floating(one) and types.is_floating(other):
        return max(one, other, key=lambda kind: kind.bit_width)
    return None


def _wider_integer(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    signed = types.is_signed_integer(one), types.is_signed_integer(other)
    if signed[0] == signed[1]:
        return max(one, other, key=lambda kind: kind.bit_width)
    unsigned, width = (other, one.bit_width) if signed[0] else (one, other.bit_width)
    needed = max(width, 2 * unsigned.bit_width)
    return {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(needed)


def _in_dictionaries(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    value = in_common(_value_of(one), _value_of(other))
    both = types.is_dictionary(one) and types.is_dictionary(other)
    if value is None or not both or one.ordered or other.ordered:
        return value
    index = _wider_integer(one.index_type, other.index_type)
    return value if index is None else pa.dictionary(index, value)


def _in_structs(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    names: Sequence[Sequence[str]] = [[item.name for item in kind] for kind in (one, other)]
    if names[0] != names[1]:
        return None
    shared = [in_common(a.type, b.type) for a, b in zip(one, other, strict=True)]
    if None in shared:
        return None
    return pa.struct(list(zip(names[0], shared, strict=True)))


def _in_lists(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    value = in_common(one.value_type, other.value_type)
    if value is None:
        return None
    is_large = types.is_large_list(one) or types.is_large_list(other)
    return pa.large_list(value) if is_large else pa.list_(value)


def _value_of(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind

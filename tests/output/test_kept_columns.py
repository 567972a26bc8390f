"""Kept columns: whatever can be written comes back as it was planned; what cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.records import Answer
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import Shards, cut_shards
from gc2ray.data.column_types import holds, in_common
from gc2ray.data.store import Store
from gc2ray.output.kept_columns import as_written
from gc2ray.output.parts import PartFooter, commit_part, part_bytes
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from gc2ray.output.verify import verify
from tests.support.rows import make_job
from tests.support.sources import rows_of, source_of, write

TENSORS = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype="f4").reshape(3, 2, 2))
TURNED = pa.ExtensionArray.from_storage(
    pa.fixed_shape_tensor(pa.float32(), (2, 2), permutation=[1, 0]), TENSORS.storage
)
UUIDS = pa.ExtensionArray.from_storage(
    pa.uuid(), pa.array([b"0" * 16, None, b"1" * 16], pa.binary(16))
)
JSON = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", None, "1"]))
TEXT = pa.array(["a", None, "b"])
NUMBERS = pa.array([1, None, 3])
TIMES = [
    *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC")),
    *(pa.time32(unit) for unit in ("s", "ms")),
    *(pa.time64(unit) for unit in ("us", "ns")),
    *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
]
DAYS = pa.array([0, None, 86_400_000])

WRITABLE: list[pa.Array] = [
    *(NUMBERS.cast(kind) for kind in (pa.int8(), pa.uint16(), pa.int32(), pa.uint64())),
    *(NUMBERS.cast(kind) for kind in (pa.float16(), pa.float32(), pa.float64())),
    *(NUMBERS.cast(kind) for kind in (pa.decimal128(30, 2), pa.decimal256(50, 2))),
    *(
        NUMBERS.cast(pa.int64()).cast(kind)
        if kind.bit_width == 64
        else NUMBERS.cast(pa.int32()).cast(kind)
        for kind in TIMES
    ),
    DAYS.cast(pa.date64()),
    DAYS.cast(pa.date64()).cast(pa.date32()),
    pa.array([True, None, False]),
    pa.nulls(3),
    *(TEXT.cast(kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *(TEXT.cast(pa.binary()).cast(k) for k in (pa.large_binary(), pa.binary_view())),
    pa.array([b"ab", None, b"cd"], pa.binary(2)),
    *(
        TEXT.dictionary_encode().cast(pa.dictionary(index, pa.string()))
        for index in (pa.int8(), pa.uint32(), pa.int64())
    ),
    TEXT.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string(), ordered=True)),
    TEXT.dictionary_encode().cast(pa.dictionary(pa.int32(), pa.large_string())),
    NUMBERS.dictionary_encode(),
    pa.array([[1, None], None, []], pa.list_(pa.int32())),
    pa.array([[[1], None], None, [[]]], pa.list_(pa.list_(pa.int32()))),
    pa.array([["a"], None, []], pa.large_list(pa.large_string())),
    pa.array([[1, 2], None, [3, None]], pa.list_(pa.float32(), 2)),
    pa.array([["a"], None, []], pa.list_view(pa.string())),
    pa.array([[1], [None], None], pa.list_(pa.timestamp("s"))),
    pa.array([[1], [2], None], pa.list_(pa.field("x", pa.int8(), nullable=False))),
    pa.array([["a"], [None], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    pa.array([{"a": 0}, None, {"a": 86_400_000}], pa.struct([("a", pa.date64())])),
    pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    pa.array([[("k", [1])], None, [("l", None)]], pa.map_(pa.string(), pa.list_(pa.int64()))),
    TENSORS,
    TURNED,
    UUIDS,
    JSON,
    pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
    pa.ExtensionArray.from_storage(pa.opaque(pa.binary(), "x", "y"), TEXT.cast(pa.binary())),
    pa.ListArray.from_arrays([0, 1, 3, 3], UUIDS),
    pa.ListArray.from_arrays([0, 1, 3, 3], JSON),
    pa.ListArray.from_arrays([0, 1, 3, 3], TENSORS),
    pa.StructArray.from_arrays([UUIDS, NUMBERS], ["u", "n"]),
]
UNWRITABLE: list[pa.DataType] = [
    pa.month_day_nano_interval(),
    pa.run_end_encoded(pa.int32(), pa.string()),
    pa.struct([]),
    pa.list_(pa.struct([])),
    pa.list_(pa.float32(), 0),
    pa.struct([("x", pa.list_(pa.int8(), 0))]),
    pa.binary(0),
    pa.sparse_union([pa.field("a", pa.int8())]),
    pa.dense_union([pa.field("a", pa.int8())]),
]


def by_type(value: Any) -> str:
    return str(getattr(value, "type", value))


def saved(path: Path, table: pa.Table) -> None:
    """As `datasets` saves it: Arrow, which has all types."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("cells", WRITABLE, ids=by_type)
def test_kept_columns_have_the_planned_types(tmp_path: Path, cells: pa.Array) -> None:
    """Run, plan and verify agree on the type; the values are the input's."""
    saved(tmp_path / "a.arrow", pa.table({"image": [b"x"] * 3, "kept": cells}))
    source = source_of(tmp_path / "a.arrow", keep=["kept"])
    files, found = source.scan()
    kept_columns = as_written(found)
    job = make_job("model", tmp_path / "a.arrow", tmp_path / "out", input__keep=["kept"])
    fingerprint = job.recipe.fingerprint()
    shards = Shards.from_shards(cut_shards(files, 3, fingerprint))
    store = Store(job.output)
    plan = store_plan(store, job, Plan(fingerprint, shards, kept_columns))
    answers = [Answer(row, Status.OK, "m", 1.0, answer="a") for row in rows_of(source)]
    footer = PartFooter(shards[0].sid, fingerprint, "t", "w", 3, stats_of(answers))
    commit_part(
        store, shards[0], part_bytes(answers, plan.kept_columns, Provenance(1, 0, "w"), footer), "t"
    )
    assert verify(job.output, deep=True).problems == ()
    kept = pq.read_table(tmp_path / "out" / shards[0].part_name)["kept"].combine_chunks()
    assert kept.type.equals(kept_columns.field("kept").type)
    twice = pa.chunked_array([kept, kept]).take([5, 0]).to_pylist()
    assert twice == kept.take([2, 0]).to_pylist(), "retries and compact take rows of several parts"
    assert as_written(kept_columns).equals(kept_columns), "for ever"
    storage = getattr(kept, "storage", kept), getattr(cells, "storage", cells)
    assert storage[0].to_pylist() == storage[1].to_pylist()


@pytest.mark.parametrize("kind", UNWRITABLE, ids=by_type)
def test_a_type_that_cannot_be_written_is_refused(kind: pa.DataType) -> None:
    with pytest.raises(ConfigError) as caught:
        as_written(pa.schema([("id", pa.int64()), ("kept", kind)]))
    assert str(caught.value).startswith(
        f"recipe.input.keep: column 'kept' is {kind}, which cannot "
    )


PAIRS: list[tuple[pa.DataType, pa.DataType, pa.DataType | None]] = [
    (pa.null(), pa.list_(pa.int8()), pa.list_(pa.int8())),
    (pa.int8(), pa.int64(), pa.int64()),
    (pa.uint8(), pa.uint32(), pa.uint32()),
    (pa.uint32(), pa.int32(), pa.int64()),
    (pa.uint8(), pa.int32(), pa.int32()),
    (pa.uint64(), pa.int64(), None),
    (pa.int32(), pa.float64(), None),
    (pa.int8(), pa.bool_(), None),
    (pa.int8(), pa.string(), None),
    (pa.float32(), pa.float64(), pa.float64()),
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), pa.string_view(), pa.string()),
    (pa.string(), pa.binary(), None),
    (pa.binary(), pa.binary(3), pa.binary()),
    (pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.string()),
    (
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int16(), pa.string()),
        pa.dictionary(pa.int16(), pa.string()),
    ),
    (pa.list_(pa.int8()), pa.large_list(pa.int64()), pa.large_list(pa.int64())),
    (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), pa.list_(pa.int8())),
    (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
    (pa.list_(pa.int8()), pa.int8(), None),
    (
        pa.struct([("a", pa.int8()), ("b", pa.null())]),
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
        pa.struct([("a", pa.int64()), ("b", pa.string())]),
    ),
    (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())]), None),
    (pa.timestamp("s"), pa.timestamp("ms"), None),
    (pa.timestamp("s"), pa.timestamp("s", "UTC"), None),
    (pa.date32(), pa.date64(), None),
]


@pytest.mark.parametrize(("one", "other", "shared"), PAIRS, ids=by_type)
def test_types_have_one_in_common_that_has_all_values(
    one: pa.DataType, other: pa.DataType, shared: pa.DataType | None
) -> None:
    assert in_common(one, other) == in_common(other, one) == shared
    if shared is not None:
        assert [pa.nulls(2, kind).cast(shared).type for kind in (one, other)] == [shared] * 2
        planned, found = pa.schema([("x", shared)]), pa.schema([("x", other)])
        assert holds(planned, found)
        assert holds(found, planned) is (shared == other)


FILES: dict[str, tuple[list[pa.Array], pa.DataType]] = {
    "widths": ([pa.array([1, None], pa.int8()), pa.array([2**40], pa.int64())], pa.int64()),
    "texts": (
        [TEXT.cast(pa.large_string()), TEXT.dictionary_encode(), TEXT, pa.nulls(1)],
        pa.large_string(),
    ),
    "null first": ([pa.nulls(2), pa.array([[1.5], None])], pa.list_(pa.float64())),
    "dictionaries": (
        [
            pa.array([f"{file}.{row}" for row in range(120)])
            .dictionary_encode()
            .cast(pa.dictionary(pa.int8(), pa.string()))
            for file in range(3)
        ],
        pa.dictionary(pa.int32(), pa.string()),
    ),
    "dictionaries in lists": (
        [
            pa.ListArray.from_arrays(
                range(121),
                pa.array([f"{file}.{row}" for row in range(120)])
                .dictionary_encode()
                .cast(pa.dictionary(pa.int8(), pa.string())),
            )
            for file in range(2)
        ],
        pa.list_(pa.string()),
    ),
    "list views and lists": (
        [
            pa.array([["cat", "pet"], None, []], pa.list_view(pa.string())),
            pa.array([["dog"], ["x", None]], pa.list_(pa.string())),
            pa.array([["hen"]], pa.large_list_view(pa.string())),
        ],
        pa.list_(pa.string()),
    ),
    "list views within structs": (
        [
            pa.array([{"a": [1, 2]}, None], pa.struct([("a", pa.list_view(pa.int8()))])),
            pa.array([{"a": [3]}], pa.struct([("a", pa.list_(pa.int8()))])),
        ],
        pa.struct([("a", pa.list_(pa.int8()))]),
    ),
}


@pytest.mark.parametrize(("arrays", "kind"), FILES.values(), ids=FILES)
def test_files_of_different_types_are_one_column(
    tmp_path: Path, arrays: list[pa.Array], kind: pa.DataType
) -> None:
    """In one part: a shard may have rows of all of them."""
    for number, cells in enumerate(arrays):
        write(tmp_path / f"{number}.parquet", image=[b"x"] * len(cells), kept=cells)
    source = source_of(tmp_path, keep=["kept"])
    kept_columns = as_written(source.scan()[1])
    plain = kept_columns.field("kept").type
    assert plain.equals(kind) or str(plain) == str(kind).replace("item", "element")
    answers = [Answer(row, Status.OK, "m", 1.0) for row in rows_of(source)]
    footer = PartFooter("0" * 16, "r", "t", "w", len(answers), stats_of(answers))
    data = pa.BufferReader(part_bytes(answers, kept_columns, Provenance(1, 0, "w"), footer))
    kept = pq.read_table(data)["kept"]
    assert kept.type.equals(plain)
    assert kept.to_pylist() == [value for cells in arrays for value in cells.to_pylist()]

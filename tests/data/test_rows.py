"""Rows to requests: which columns are taken, and what a bad row or prompt costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.core.schema import Provenance, answer_table
from tests.support.sources import COLUMN, MEMORY, refusal, rows_of, source_of, whole, write


def test_a_column_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array([b"y"])], names=["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "several columns 'image'" in refusal(source_of(tmp_path))


def test_a_required_column_is_written_back_as_nullable(tmp_path: Path) -> None:
    schema = pa.schema([("image", pa.binary()), pa.field("id", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"image": [b"x"], "id": [1]}, schema=schema), tmp_path / "a.parquet")
    _, kept = source_of(tmp_path, keep=["id"]).scan()
    assert kept.field("id").nullable


@pytest.mark.parametrize(
    ("cells", "kind", "expected"),
    [
        ([b"x", None], pa.binary(), [ImageRef(b"x"), ImageRef()]),
        ([b"x", b""], pa.large_binary(), [ImageRef(b"x"), ImageRef(b"")]),
        (["a.png", None], pa.string(), [ImageRef(path="a.png"), ImageRef()]),
        (["a.png"], pa.large_string(), [ImageRef(path="a.png")]),
        (
            [{"bytes": b"x", "path": "a.png"}, {"bytes": None, "path": "a.png"}, None],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            [ImageRef(b"x", "a.png"), ImageRef(path="a.png"), ImageRef()],
        ),
        ([{"bytes": b"x"}], pa.struct([("bytes", pa.binary())]), [ImageRef(b"x")]),
        ([{"path": "a"}], pa.struct([("path", pa.string())]), [ImageRef(path="a")]),
        ([b"x", None], pa.binary_view(), [ImageRef(b"x"), ImageRef()]),
        ([b"xy"], pa.binary(2), [ImageRef(b"xy")]),
        ([b"x", b"x"], pa.dictionary(pa.int8(), pa.binary()), [ImageRef(b"x")] * 2),
        (["a", None], pa.string_view(), [ImageRef(path="a"), ImageRef()]),
        (["a", "a"], pa.dictionary(pa.int8(), pa.string()), [ImageRef(path="a")] * 2),
        ([None], pa.null(), [ImageRef()]),
        (
            [{"bytes": b"x", "path": None}],
            pa.struct([("bytes", pa.binary_view()), ("path", pa.null())]),
            [ImageRef(b"x")],
        ),
    ],
)
def test_image_columns(
    tmp_path: Path, cells: list[object], kind: pa.DataType, expected: list[ImageRef]
) -> None:
    write(tmp_path / "a.parquet", image=pa.array(cells, kind))
    rows = rows_of(source_of(tmp_path, image_roots=["/photos"]))
    assert [request.images for request in rows] == [(image,) for image in expected]


IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.large_list(pa.binary_view())], ids=str)
def test_a_list_column_has_several_images_or_none(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", image=pa.array([[b"x", b"y"], [b"z"], []], kind))
    rows = rows_of(source_of(tmp_path))
    expected = [(ImageRef(b"x"), ImageRef(b"y")), (ImageRef(b"z"),), ()]
    assert [request.images for request in rows] == expected
    assert [request.fault for request in rows] == [None] * 3


def test_a_missing_image_of_a_list_costs_its_row(tmp_path: Path) -> None:
    """Null is not an empty list: answering without an image that was meant would be wrong."""
    image = {"bytes": b"x", "path": None}
    write(tmp_path / "a.parquet", image=pa.array([None, [image, None, image], [image]], IMAGES))
    null, within, good = rows_of(source_of(tmp_path))
    for request in (null, within):
        assert request.fault is not None
        assert request.fault.status is Status.BAD_IMAGE
    assert "image column 'image' is null; an empty list is a row" in str(null.fault)
    assert "image 2 of 3 is null" in str(within.fault)
    assert good.images == (ImageRef(b"x"),)


def test_rows_may_have_no_image_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"q": ["Why?", "How?"]}), tmp_path / "a.parquet")
    source = source_of(tmp_path, image=None, prompt={"column": "q"})
    rows = rows_of(source)
    assert [(request.images, request.prompts) for request in rows] == [
        ((), ("Why?",)), ((), ("How?",))
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.list_(pa.string())], ids=str)
def test_lists_of_paths_need_a_root(tmp_path: Path, kind: pa.DataType) -> None:
    write(tmp_path / "a.parquet", image=pa.array([], kind))
    assert refusal(source_of(tmp_path)).startswith("recipe.input.image_roots: column 'image' is li")


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.struct([("path", pa.string())])], ids=str
)
def test_images_by_path_need_a_root(tmp_path: Path, kind: pa.DataType) -> None:
    """Without one every row would fail, one by one."""
    write(tmp_path / "a.parquet", image=pa.array([], kind))
    message = refusal(source_of(tmp_path))
    start = f"recipe.input.image_roots: column 'image' is {kind} in a.parquet: images by path"
    assert message.startswith(start)


def test_a_missing_column_is_named_with_its_nearest(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=[b"x"], question=["q"])
    assert refusal(source_of(tmp_path, prompt={"column": "qestion"})) == (
        "recipe.input: no column 'qestion' in a.parquet; did you mean 'question'?"
    )
    assert refusal(source_of(tmp_path, keep=["zzz"])) == (
        "recipe.input: no column 'zzz' in a.parquet; it has image, question"
    )
    assert "no column 'imag'" in refusal(source_of(tmp_path, image="imag"))
    assert "no column 'r'" in refusal(source_of(tmp_path, prompt={"template": "{question} {r}"}))


@pytest.mark.parametrize(
    ("image", "prompt", "key"),
    [
        ([1], ["q"], "recipe.input.image: column 'image' is int64"),
        ([[[b"x"]]], ["q"], "recipe.input.image: column 'image' is list<"),
        ([{"data": b"x"}], ["q"], "recipe.input.image: column 'image' is struct<data"),
        ([{"bytes": "eA=="}], ["q"], "recipe.input.image: column 'image' is struct<bytes: string>"),
        ([{"bytes": [1]}], ["q"], "recipe.input.image: column 'image' is struct<bytes: list<"),
        ([{"bytes": b"x", "path": 1}], ["q"], "recipe.input.image: column 'image' is struct<bytes"),
        (
            [b"x"],
            [1],
            "recipe.input.prompt.column: column 'prompt' is int64 in a.parquet; expected string",
        ),
        ([b"x"], [[1]], "recipe.input.prompt.column: column 'prompt' is list<"),
        ([b"x"], [[["q"]]], "recipe.input.prompt.column: column 'prompt' is list<"),
        ([b"x"], [{"q": "r"}], "recipe.input.prompt.column: column 'prompt' is struct<"),
    ],
)
@pytest.mark.parametrize("name", ["a.parquet", "c.parquet"])
def test_wrong_types_are_refused_whichever_file_has_them(
    tmp_path: Path, image: Any, prompt: Any, key: str, name: str
) -> None:
    write(tmp_path / "b.parquet", image=[b"x"], prompt=["q"])
    write(tmp_path / name, image=image, prompt=prompt)
    message = refusal(source_of(tmp_path, prompt=COLUMN))
    assert message.startswith(key.replace("a.parquet", name))
    assert f"in {name}; expected" in message


TIMES = [pa.timestamp("us"), pa.date32(), pa.time64("us")]


@pytest.mark.parametrize(
    ("cells", "fits"),
    [
        (pa.array(["q"]), True),
        (pa.array(["q"]).dictionary_encode(), True),
        (pa.array([1]), True),
        (pa.array([1]).dictionary_encode(), True),
        (pa.array([True]), True),
        (pa.array([1], pa.decimal128(3)), True),
        *(
            (pa.array([1]).cast(kind if kind != pa.date32() else pa.int32()), True)
            for kind in TIMES
        ),
        (pa.nulls(1), True),
        (pa.array([b"q"]), False),
        (pa.array([b"q"], pa.binary(1)), False),
        (pa.array([["q"]]), False),
        (pa.array([{"q": 1}]), False),
        (pa.array([[("q", 1)]], pa.map_(pa.string(), pa.int8())), False),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_templates_take_what_reads_as_text(tmp_path: Path, cells: pa.Array, *, fits: bool) -> None:
    write(tmp_path / "a.parquet", image=[b"x"], x=cells)
    source = source_of(tmp_path, prompt={"template": "{x}?"})
    if fits:
        assert len(rows_of(source)) == 1
    else:
        assert refusal(source).startswith("recipe.input.prompt.template: column 'x' is ")


@pytest.mark.parametrize("twice", ["image", "prompt", "id"])
def test_a_column_that_a_later_file_has_twice_is_reported(tmp_path: Path, twice: str) -> None:
    write(tmp_path / "a.parquet", image=[b"x"], prompt=["q"], id=[1])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.append_column(twice, table[twice]), tmp_path / "b.parquet")
    message = refusal(source_of(tmp_path, prompt=COLUMN, keep=["id"]))
    assert message == f"recipe.input: b.parquet has several columns {twice!r}"


def test_files_must_agree_on_what_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=[b"x"], id=[1], other=[1])
    write(tmp_path / "sub" / "b.parquet", image=[b"x"], id=["one"], more=[2])
    assert refusal(source_of(tmp_path, keep=["id"])) == (
        "recipe.input.keep: column 'id' is string in sub/b.parquet and int64 in a.parquet; cast it "
        "in the input, or do not keep it"
    )
    message = refusal(source_of(tmp_path, keep=["other"]))
    assert message.startswith("recipe.input: no column 'other' in sub/b.parquet; ")
    assert len(source_of(tmp_path).scan()[0]) == 2  # columns that are not read may differ


def test_a_request_names_its_source_and_row(tmp_path: Path) -> None:
    write(tmp_path / "in" / "s" / "a.parquet", image=[b"x", b"y"], q=["one", "two"], n=[1, 2])
    source = source_of(tmp_path / "in", prompt={"template": "{q}, {n}"}, keep=["n", "q"])
    assert rows_of(source)[1] == Request(
        row_key="s/a.parquet#1",
        source="s/a.parquet",
        row=1,
        images=(ImageRef(b"y"),),
        prompts=("two, 2",),
        kept_columns={"n": pa.scalar(2), "q": pa.scalar("two")},
    )


def test_a_bad_prompt_fails_only_its_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=[b"x"] * 4, prompt=["a", None, " ", "d"])
    rows = rows_of(source_of(tmp_path, prompt=COLUMN))
    assert [row.fault and row.fault.status for row in rows] == [
        None,
        Status.BAD_PROMPT,
        Status.BAD_PROMPT,
        None,
    ]
    assert [row.prompts for row in rows] == [("a",), (), (), ("d",)]


LISTS = [["a", "b", "c"], None, [], ["d", None, " ", "e"], ["f"]]
LISTED = [
    (0, 0, "a", None),
    (0, 1, "b", None),
    (0, 2, "c", None),
    (1, 0, None, "prompt column 'prompt' is null"),
    (2, 0, None, "prompt column 'prompt' holds no prompt"),
    (3, 0, "d", None),
    (3, 1, None, "prompt 1 in column 'prompt' is null"),
    (3, 2, None, "the prompt is empty"),
    (3, 3, "e", None),
    (4, 0, "f", None),
]


def summaries(rows: list[Request]) -> list[tuple[int, int, str | None, str | None]]:
    """Row, prompt index, and either the prompt or what is wrong with it."""
    assert all(row.fault is None or row.fault.status is Status.BAD_PROMPT for row in rows)
    return [
        (row.row, row.prompt_index, *(row.prompts or (None,)), row.fault and row.fault.message)
        for row in rows
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.list_(pa.string_view()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.large_list(pa.string()),
        pa.list_(pa.large_string()),
        pa.large_list(pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", [1, MEMORY])
def test_a_list_gives_a_request_per_prompt(tmp_path: Path, kind: pa.DataType, memory: int) -> None:
    """In order; a row without a prompt has one request, and a bad prompt spoils no other."""
    images = [b"%d" % row for row in range(5)]
    write(tmp_path / "a.parquet", row_group=2, image=images, prompt=pa.array(LISTS, kind))
    rows = rows_of(source_of(tmp_path, prompt=COLUMN, keep=["prompt"]), memory)
    assert summaries(rows) == LISTED
    assert [row.row_key for row in rows] == [f"a.parquet#{r}#{i}" for r, i, _, _ in LISTED]
    assert [row.prompt_count for row in rows] == [max(1, len(LISTS[r] or ())) for r, *_ in LISTED]
    assert [row.images[0].data for row in rows] == [b"%d" % r for r, _, _, _ in LISTED]
    assert [row.kept_columns.get("prompt", pa.scalar(None)).as_py() for row in rows] == [
        LISTS[r] for r, _, _, _ in LISTED
    ]
    assert len({row.seed for row in rows}) == len(rows)


def test_a_list_of_fixed_size_is_a_list(tmp_path: Path) -> None:
    prompts = pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string(), 2))
    write(tmp_path / "a.parquet", image=[b"x"] * 3, prompt=prompts)
    rows = rows_of(source_of(tmp_path, prompt=COLUMN))
    assert [(row.row, row.prompt_index, row.prompts) for row in rows] == [
        (0, 0, ("a",)),
        (0, 1, ("b",)),
        (1, 0, ()),
        (2, 0, ("c",)),
        (2, 1, ()),
    ]


def test_the_prompts_of_a_row_share_its_image(tmp_path: Path) -> None:
    """The same object: bytes are held once, however many prompts there are."""
    write(tmp_path / "a.parquet", image=[b"x", b"x"], prompt=[["a", "b", None], ["c"]])
    a, b, bad, c = (row.images[0] for row in rows_of(source_of(tmp_path, prompt=COLUMN)))
    assert a is b is bad
    assert a == c
    assert a is not c


def test_an_unreadable_image_fails_every_prompt_of_its_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=NOT_UTF8, prompt=[["a"], ["b", "c", None]])
    rows = rows_of(source_of(tmp_path, prompt=COLUMN, image_roots=["/photos"]))
    assert [row.fault and row.fault.status for row in rows] == [None, *[Status.BAD_IMAGE] * 3]
    assert len({id(row.fault) for row in rows}) == 4, "an exception belongs to one request"
    assert [row.row_key for row in rows[1:]] == [f"a.parquet#1#{index}" for index in range(3)]


def test_a_prompt_that_is_not_utf8_fails_alone(tmp_path: Path) -> None:
    prompts = pa.ListArray.from_arrays([0, 2], NOT_UTF8)
    write(tmp_path / "a.parquet", image=[b"x"], prompt=prompts)
    rows = rows_of(source_of(tmp_path, prompt=COLUMN))
    assert [row.prompts for row in rows] == [("hi",), ()]
    assert rows[1].fault is not None
    assert rows[1].fault.status is Status.BAD_PROMPT


def test_files_may_have_lists_or_not(tmp_path: Path) -> None:
    """Each by its own type, so that one prompt and a list of one are told apart by their keys."""
    write(tmp_path / "a.parquet", image=[b"x"], prompt=["one"])
    write(tmp_path / "b.parquet", image=[b"x"], prompt=[["one"]])
    rows = rows_of(source_of(tmp_path, prompt=COLUMN))
    assert [(row.row_key, row.prompts) for row in rows] == [
        ("a.parquet#0", ("one",)),
        ("b.parquet#0#0", ("one",)),
    ]


@settings(deadline=None, max_examples=60)
@given(
    lists=st.lists(
        st.none() | st.lists(st.none() | st.sampled_from(["", " ", "a", "b"]), max_size=4),
        min_size=1,
        max_size=12,
    ),
    group=st.integers(1, 5),
    data=st.data(),
)
def test_flattening_neither_loses_nor_repeats_prompts(
    tmp_path_factory: pytest.TempPathFactory,
    lists: list[list[str | None] | None],
    group: int,
    data: st.DataObject,
) -> None:
    """Of any span: every row, each of its prompts once, in order; only good ones have text."""
    prompts = pa.array(lists, pa.list_(pa.string()))
    root = tmp_path_factory.mktemp("lists")
    write(root / "a.parquet", row_group=group, image=[b"x"] * len(lists), prompt=prompts)
    source = source_of(root, prompt=COLUMN)
    (file,), _ = source.scan()
    first = data.draw(st.integers(0, len(lists) - 1))
    span = replace(whole(file), first=first, stop=data.draw(st.integers(first + 1, len(lists))))
    rows = list(source.read(span, host_memory_bytes=data.draw(st.sampled_from([1, MEMORY]))))
    expected = [
        (row, index, text if text and text.strip() else None)
        for row in range(span.first, span.stop)
        for index, text in enumerate(lists[row] or [None])
    ]
    assert [(row, index, text) for row, index, text, _ in summaries(rows)] == expected
    assert all((row.fault is None) == bool(row.prompts) for row in rows)


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"hi\xff\xfe")]
)


def test_text_that_is_not_utf8_fails_only_its_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", image=[b"x", b"y"], prompt=NOT_UTF8)
    rows = rows_of(source_of(tmp_path, prompt=COLUMN))
    assert [row.fault and row.fault.status for row in rows] == [None, Status.BAD_PROMPT]
    by_path = {"image": "prompt", "image_roots": ["/photos"]}
    rows = rows_of(source_of(tmp_path, **by_path, prompt={"constant": "q"}))
    assert [row.fault and row.fault.status for row in rows] == [None, Status.BAD_IMAGE]


@pytest.mark.parametrize(
    "values",
    [
        NOT_UTF8,
        pa.array([1, 2**40], pa.timestamp("s")),  # beyond the year 9999
        pa.array([1, None], pa.timestamp("ns", tz="UTC")),
        pa.array([["a", None], []], pa.list_(pa.string())),
        pa.array([{"a": 1, "b": [{"c": b"x"}]}, None]),
        pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        pa.array(["a", None]).dictionary_encode(),
        pa.nulls(2),
    ],
    ids=lambda values: str(values.type),
)
def test_kept_values_are_unchanged(tmp_path: Path, values: pa.Array) -> None:
    path = write(tmp_path / "a.parquet", image=[b"x", b"y"], kept=values)
    source = source_of(tmp_path, keep=["kept"])
    _, kept = source.scan()
    answers = [Answer(row, Status.OK, "m", 1.0) for row in rows_of(source)]
    table = answer_table(answers, kept, Provenance(1, 0, "w"))
    assert table["kept"].equals(pq.read_table(path)["kept"])

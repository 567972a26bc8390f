"""Datasets of the hub, datasets that `datasets` saved, and their Arrow files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub.errors import HTTPError as HubError
from huggingface_hub.errors import OfflineModeIsEnabled

from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.source import Source
from tests.support.rows import make_recipe, picture
from tests.support.sources import COLUMN, MEMORY, refusal, rows_of, source_of, whole


def test_a_dataset_of_the_hub_is_its_converted_files(monkeypatch: pytest.MonkeyPatch) -> None:
    globs: list[str] = []

    class Hub:
        protocol = "hf"

        def glob(self, path: str, *, detail: bool) -> dict[str, object]:
            globs.append(path)
            return {}

        def invalidate_cache(self) -> None:
            pass

    def url_to_fs(url: str) -> tuple[Hub, str]:
        return Hub(), url.removeprefix("hf://")

    monkeypatch.setattr(fsspec.core, "url_to_fs", url_to_fs)
    refusal(source_of("hf:owner/name?split=train"))
    refusal(source_of("hf:name?split=test&subset=large"))
    assert globs == [
        "datasets/owner/name@refs/convert/parquet/default/train/*.parquet",
        "datasets/name@refs/convert/parquet/large/test/*.parquet",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HubError("connection refused"), "tried for 0 s, last: HTTPError: connection refused"),
        (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), "HF_HUB_OFFLINE is set"),
    ],
    ids=["out of reach", "offline"],
)
def test_a_hub_that_does_not_answer_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    hub = Mock(protocol="hf")
    hub.glob.side_effect = error
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda _: (hub, "datasets/a/*.parquet"))
    config = make_recipe("model", input__uri="hf:owner/name?split=train").input
    with pytest.raises(ConfigError, match=rf"recipe\.input\.uri: datasets/a.*: .*{message}"):
        Source(config, RetryPolicy(total_seconds=0.0)).scan()


@pytest.mark.parametrize(
    "uri", ["hf:owner/name", "hf:owner/name?splt=train", "hf:a/b/c?split=train", "hf:?"]
)
def test_a_dataset_of_the_hub_needs_a_split(uri: str) -> None:
    assert "is not of the form hf:OWNER/NAME?split=SPLIT" in refusal(source_of(uri))


def save_dataset(folder: Path, rows: int = 7, **options: Any) -> Dataset:
    """A dataset of real images, saved as `datasets` does."""
    names = [f"{folder}-{index}.png" for index in range(rows)]
    for index, name in enumerate(names):
        picture((8, 9), index).save(name)
    features = Features({"image": ImageFeature(), "prompt": Value("string"), "id": Value("int64")})
    prompts = [f"Question {index}?" for index in range(rows)]
    columns = {"image": names, "prompt": prompts, "id": list(range(rows))}
    dataset = Dataset.from_dict(columns, features=features)
    dataset.save_to_disk(folder, **options)
    return dataset


def test_a_saved_dataset_is_read_in_place(tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "saved", num_shards=2)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"not of the dataset")
    source = source_of(tmp_path / "saved", prompt=COLUMN, keep=["id"])
    files, _ = source.scan()
    assert [(file.source, file.rows) for file in files] == [
        ("data-00000-of-00002.arrow", 4),
        ("data-00001-of-00002.arrow", 3),
    ]
    rows = rows_of(source)
    assert [row.kept_columns["id"].as_py() for row in rows] == list(range(7))
    assert [row.prompts for row in rows] == [(f"Question {index}?",) for index in range(7)]
    raw = dataset.cast_column("image", ImageFeature(decode=False))
    for row, image in zip(rows, raw["image"], strict=True):
        assert row.images[0].data == Path(image["path"]).read_bytes()
    with pytest.raises(ShardError, match="changed since"):
        list(source.read(replace(whole(files[0]), fingerprint="another"), MEMORY))


def test_a_saved_selection_is_read_as_selected(tmp_path: Path) -> None:
    """`datasets` writes the selected rows, in their order."""
    dataset = save_dataset(tmp_path / "all")
    dataset.select([5, 2, 3]).save_to_disk(tmp_path / "some")
    rows = rows_of(source_of(tmp_path / "some", keep=["id"]))
    assert [row.kept_columns["id"].as_py() for row in rows] == [5, 2, 3]


def test_a_split_of_a_saved_dataset_must_be_named(tmp_path: Path) -> None:
    dataset = save_dataset(tmp_path / "all")
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "dict")
    refused = refusal(source_of(tmp_path / "dict"))
    assert f"holds the splits train, test; name one of them, as {tmp_path}/dict/train" in refused
    assert len(rows_of(source_of(tmp_path / "dict" / "test"))) == 7


@pytest.mark.parametrize("content", ["", "{}", '{"_data_files": 1}', '{"_data_files": [1]}'])
def test_a_damaged_state_is_a_configuration_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    assert "state.json: not written by datasets" in refusal(source_of(tmp_path))


def test_an_arrow_file_with_an_index_is_read_too(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 10, "id": list(range(10))})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=4)
    source = source_of(tmp_path / "a.arrow", keep=["id"])
    (file,), _ = source.scan()
    assert file.groups == (4, 4, 2)
    read = [
        row.kept_columns["id"].as_py() for row in source.read(replace(whole(file), first=3), MEMORY)
    ]
    assert read == list(range(3, 10))


def test_an_invalid_arrow_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"nothing of the kind")
    assert "a.arrow cannot be read" in refusal(source_of(tmp_path / "a.arrow"))


def test_an_arrow_file_on_remote_storage_is_refused(in_memory: str) -> None:
    fsspec.filesystem("memory").pipe_file("/gc2ray-input/x.arrow", b"")
    assert "an Arrow file on remote storage" in refusal(source_of(f"{in_memory}/x.arrow"))

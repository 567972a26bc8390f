"""Inputs that several modules of this folder read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.sources import write


@pytest.fixture
def parquet_tree(tmp_path: Path) -> Path:
    """A folder of four files that are read, and of others that are not."""
    root = tmp_path / "in"
    for name in ("b.parquet", "a.parquet", "sub/c.parquet", "sub/deep/d.parquet"):
        write(root / name, image=[b"x"], prompt=["q"])
    for name in ("_meta.parquet", ".hidden.parquet", "_tmp/e.parquet", "sub/.git/f.parquet"):
        write(root / name, image=[b"x"], prompt=["q"])
    (root / "notes.txt").write_text("no rows")
    (root / "_SUCCESS").write_text("")
    return root


@pytest.fixture
def in_memory() -> Iterator[str]:
    """Two files in memory that are read, and one that is not, under a URL."""
    filesystem = fsspec.filesystem("memory")
    filesystem.mkdirs("/gc2ray-input/sub", exist_ok=True)
    for name in ("a.parquet", "sub/b.parquet", "_c.parquet"):
        with filesystem.open(f"/gc2ray-input/{name}", "wb") as handle:
            pq.write_table(pa.table({"image": [b"x", b"y"], "id": [1, 2]}), handle)
    yield "memory://gc2ray-input"
    filesystem.rm("/gc2ray-input", recursive=True)

"""The formats of input files by the ending of a file's name.

To add one: a `gc2ray.data.formats.base.RowFormat` in a file of its own in this folder, and a line
in `FORMATS`. A folder or an open pattern takes Parquet files only
(`gc2ray.data.input_entries`), so an input names files of other formats by a pattern with their
ending.
"""

from __future__ import annotations

from gc2ray.data.formats import arrow, parquet
from gc2ray.data.formats.base import RowFormat

FORMATS: dict[str, RowFormat] = {".parquet": parquet.FORMAT, ".arrow": arrow.FORMAT}


def format_of(path: str) -> RowFormat:
    """The format of a file; Parquet for any other ending."""
    ending = next((ending for ending in FORMATS if path.endswith(ending)), ".parquet")
    return FORMATS[ending]

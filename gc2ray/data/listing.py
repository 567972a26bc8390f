"""`Listing`: the files of an input, and the names of its sources.

An input is one entry or a list of entries (`gc2ray.data.input_entries`), all on one storage. A file
that several entries name, or one entry under several names, is one source.

A source is named by its path below the root: the folder that is given, the folder of a file that is
given, or the folder before the first component of a pattern; for a list, the deepest folder that
all entries share. Paths of a storage are never rewritten, because doubled slashes and dots may be
part of a name. The query of a web URL (`?…`, often a signature) is not part of the source's name,
unless several URLs differ by it alone.

Folders may spell out columns, as Hive and Spark name them: `lang=de/year=2024/a.parquet`. Only
folders below the root count. Such columns are typed as `pyarrow.dataset` types them, over all files
(int32 where all values are integers, else text), and written back with that type; prompts take the
values as they are spelled. Other names of folders, as `2024/05/`, make no columns.

Not covered: datasets of the hub of which it has converted only a part: name their own files, as
`hf://datasets/OWNER/NAME/data/train-*.parquet`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from gc2ray.core.errors import ConfigError
from gc2ray.data.input_entries import URI_KEY, InputEntry, is_local, is_web
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.storage import protocols, storage_of, without_dots

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"}
"""Names of their objects are keys, not paths: `..` is part of a key."""

NULL_VALUE = "__HIVE_DEFAULT_PARTITION__"

PartitionValues = Mapping[str, str | None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """An input on its storage.

    Attributes:
        filesystem: The storage.
        root: The folder that names of sources are relative to; empty, or ends with a slash.
        entries: The entries.
        retry_policy: How long temporary trouble of the storage is waited out.
        queries: The query, with its `?`, of each URL that is named without it.
    """

    filesystem: Any
    root: str
    entries: tuple[InputEntry, ...]
    retry_policy: RetryPolicy
    queries: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def from_uris(uris: Sequence[str], retry_policy: RetryPolicy) -> Listing:
        """The listing of an input; no file is listed yet.

        Raises:
            ConfigError: There is no such storage, or several.
        """
        entries = tuple(InputEntry.from_uri(uri, retry_policy) for uri in uris)
        first = entries[0].filesystem
        if any(entry.filesystem != first for entry in entries):
            raise ConfigError(
                f"{URI_KEY}: its entries are on different storages; copy the files to one storage, "
                "or run once for each"
            )
        root = _common([entry.root for entry in entries])
        queries = _queries(entries) if is_web(first) else {}
        return Listing(first, root, entries, retry_policy, queries)

    @contextmanager
    def listed(self) -> Iterator[list[str]]:
        """The files: entry by entry, sorted by name within an entry, none twice.

        Inside the context the storage's metadata is cached, which saves a call for each file. The
        cache is dropped at the end, so that later changes are noticed.

        Raises:
            ConfigError: As `InputEntry.files`.
        """
        self.filesystem.invalidate_cache()
        try:
            files = [entry.files(self.retry_policy) for entry in self.entries]
            empty = [entry for entry, listed in zip(self.entries, files, strict=True) if not listed]
            if len(empty) < len(files):
                for entry in empty:
                    log.warning("%s: no Parquet files at %s", URI_KEY, entry.shown)
            once: dict[str, str] = {}
            for path in itertools.chain(*files) if len(files) > 1 else ():
                once.setdefault(self._identity(path), path)
            yield list(once.values()) or files[0]
        finally:
            self.filesystem.invalidate_cache()

    def missing(self) -> str:
        """A hint at what is missing, for an input without files; empty if there is none."""
        for entry in self.entries:
            bucket = entry.root.split("/")[0]
            if {"s3", "gs"} & set(protocols(self.filesystem)) and not self._is_there(bucket):
                return f": there is no bucket {bucket!r}, or no permission to list it"
        return ""

    def _is_there(self, path: str) -> bool:
        return bool(self.filesystem.exists(path))

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether one of some files would be part of the input, if it existed.

        Args:
            folder: Local path or fsspec URL of a folder.
            names: Names of the files, relative to it.
        """
        filesystem, path = storage_of(folder)
        same = bool(filesystem == self.filesystem)
        return same and any(entry.would_take(path, names) for entry in self.entries)

    def source(self, path: str) -> str:
        """The name of a file in answers."""
        plain, mark, query = path.partition("?")
        named = plain if self.queries.get(plain) == f"{mark}{query}" else path
        return named.removeprefix(self.root)

    def path(self, source: str) -> str:
        """The inverse of `source`."""
        named = f"{self.root}{source}"
        return f"{named}{self.queries.get(named, '')}"

    def others(self, paths: Sequence[str], sources: Collection[str]) -> list[str]:
        """The files that are not among some sources under any name."""
        identities = {self._identity(self.path(source)) for source in sources}
        return [path for path in paths if self._identity(path) not in identities]

    def _identity(self, path: str) -> str:
        """A name that is the same for all spellings of a file."""
        if is_local(self.filesystem):
            return os.path.realpath(path)
        if OBJECT_STORES & set(protocols(self.filesystem)):
            return path
        if not is_web(self.filesystem):
            return without_dots(path)
        url = urlsplit(path)
        return url._replace(netloc=url.netloc.lower(), path=without_dots(url.path)).geturl()


def _common(roots: Sequence[str]) -> str:
    """The deepest folder that all roots share, with a slash at its end."""
    if len(set(roots)) == 1:
        return f"{roots[0]}/"
    shared = []
    for parts in zip(*(root.split("/") for root in roots), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}/" for part in shared)


def _queries(entries: Sequence[InputEntry]) -> dict[str, str]:
    """The queries of URLs that no other entry names with another query, by URL."""
    split = {entry.path: entry.path.partition("?") for entry in entries if entry.path}
    count = Counter(plain for plain, _, _ in split.values())
    return {plain: f"{mark}{query}" for plain, mark, query in split.values() if count[plain] == 1}


def partition_values(source: str) -> dict[str, str | None]:
    """The values that the folders of a source spell out, by column."""
    values: dict[str, str | None] = {}
    for folder in source.split("/")[:-1]:
        name, equals, text = folder.partition("=")
        if equals:
            value = None if text == NULL_VALUE else _unquoted(text)
            values.setdefault(_unquoted(name), value)
    return values


def partition_types(sources: Iterable[PartitionValues]) -> dict[str, pa.DataType]:
    """The type of each column, judged by its values in all sources."""
    values: dict[str, set[str | None]] = {}
    for source in sources:
        for name, value in source.items():
            values.setdefault(name, set()).add(value)
    return {name: _partition_type(texts - {None}) for name, texts in values.items()}


def _partition_type(values: set[str | None]) -> pa.DataType:
    if not values:
        return pa.null()
    try:
        pa.array(list(values), pa.string()).cast(pa.int32())
    except pa.ArrowInvalid:
        return pa.string()
    return pa.int32()


def _unquoted(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text

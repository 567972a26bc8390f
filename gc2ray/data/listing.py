"""`Listing`: which files an input is made of, and what they are called.

An input is an entry or a list of these, all on one storage; `gc2ray.data.places` says what an
entry is. A file that several entries name, or one in several ways, is one source.

Sources are named by their path below the root: the folder that is named, the one of the file, the
one before the first component of a pattern; of a list the deepest that all have in common. Paths
of a storage are never rewritten: their doubled slashes and dots may be part of a name. What stands
behind `?` in a URL of the web, often a signature, is no part of its source's name where that names
one URL only.

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
from gc2ray.data.places import URI_KEY, Place, is_local, is_web
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.storage import protocols, storage_of, without_dots

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf"}
"""Their names are keys, not paths: `..` is part of one."""

NULL_VALUE = "__HIVE_DEFAULT_PARTITION__"

PartitionValues = Mapping[str, str | None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """An input on its storage.

    Attributes:
        filesystem: The storage.
        root: What sources are named below; ends with a slash, where it is not empty.
        places: The entries.
        retry_policy: With the storage in trouble.
        queries: Of URLs that are named without their query, by that name: the query, with its `?`.
    """

    filesystem: Any
    root: str
    places: tuple[Place, ...]
    retry_policy: RetryPolicy
    queries: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def from_uris(uris: Sequence[str], retry_policy: RetryPolicy) -> Listing:
        """Where an input is; nothing is listed yet.

        Raises:
            ConfigError: There is no such storage, or several.
        """
        places = tuple(Place.from_uri(uri, retry_policy) for uri in uris)
        first = places[0].filesystem
        if any(place.filesystem != first for place in places):
            raise ConfigError(
                f"{URI_KEY}: its entries are on different storages; copy, or run twice"
            )
        root = _common([place.root for place in places])
        queries = _queries(places) if is_web(first) else {}
        return Listing(first, root, places, retry_policy, queries)

    @contextmanager
    def listed(self) -> Iterator[list[str]]:
        """Its files: entry after entry, each in order of name, none twice.

        Within, what the storage has told of each is remembered, so that it is not asked of each
        again; afterwards nothing is, or a file that changes later would not be noticed.

        Raises:
            ConfigError: As `Place.files`.
        """
        self.filesystem.invalidate_cache()
        try:
            files = [place.files(self.retry_policy) for place in self.places]
            empty = [place for place, found in zip(self.places, files, strict=True) if not found]
            if len(empty) < len(files):
                for place in empty:
                    log.warning("%s: no Parquet files at %s", URI_KEY, place.shown)
            once: dict[str, str] = {}
            for path in itertools.chain(*files) if len(files) > 1 else ():
                once.setdefault(self._identity(path), path)
            yield list(once.values()) or files[0]
        finally:
            self.filesystem.invalidate_cache()

    def missing(self) -> str:
        """What is not there, of an input without files: a word more than that, if any is known."""
        for place in self.places:
            bucket = place.root.split("/")[0]
            if {"s3", "gs"} & set(protocols(self.filesystem)) and not self._is_there(bucket):
                return f": there is no bucket {bucket!r}, or no permission to list it"
        return ""

    def _is_there(self, path: str) -> bool:
        return bool(self.filesystem.exists(path))

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether one of some files would be input, if it were there.

        Args:
            folder: That they are below: local path, or any fsspec URL.
            names: Theirs, below that.
        """
        filesystem, path = storage_of(folder)
        same = bool(filesystem == self.filesystem)
        return same and any(place.would_take(path, names) for place in self.places)

    def source(self, path: str) -> str:
        """What a file is called in answers."""
        plain, mark, query = path.partition("?")
        named = plain if self.queries.get(plain) == f"{mark}{query}" else path
        return named.removeprefix(self.root)

    def path(self, source: str) -> str:
        """The inverse of `source`."""
        named = f"{self.root}{source}"
        return f"{named}{self.queries.get(named, '')}"

    def others(self, paths: Sequence[str], sources: Collection[str]) -> list[str]:
        """Files that are none of some sources, under whatever name."""
        known = {self._identity(self.path(source)) for source in sources}
        return [path for path in paths if self._identity(path) not in known]

    def _identity(self, path: str) -> str:
        """The same for all spellings of a file."""
        if is_local(self.filesystem):
            return os.path.realpath(path)
        if OBJECT_STORES & set(protocols(self.filesystem)):
            return path
        if not is_web(self.filesystem):
            return without_dots(path)
        url = urlsplit(path)
        return url._replace(netloc=url.netloc.lower(), path=without_dots(url.path)).geturl()


def _common(roots: Sequence[str]) -> str:
    """The deepest folder that some have in common, or all there are, with a slash at the end."""
    if len(set(roots)) == 1:
        return f"{roots[0]}/"
    shared = []
    for parts in zip(*(root.split("/") for root in roots), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}/" for part in shared)


def _queries(places: Sequence[Place]) -> dict[str, str]:
    """Queries of files that no other entry tells apart, by URL."""
    split = {place.path: place.path.partition("?") for place in places if place.path}
    count = Counter(plain for plain, _, _ in split.values())
    return {plain: f"{mark}{query}" for plain, mark, query in split.values() if count[plain] == 1}


def partition_values(source: str) -> dict[str, str | None]:
    """What the folders of a source say, by column."""
    found: dict[str, str | None] = {}
    for folder in source.split("/")[:-1]:
        name, equals, text = folder.partition("=")
        if equals:
            value = None if text == NULL_VALUE else _unquoted(text)
            found.setdefault(_unquoted(name), value)
    return found


def partition_types(sources: Iterable[PartitionValues]) -> dict[str, pa.DataType]:
    """The type of each column, by the values that it has in all sources."""
    values: dict[str, set[str | None]] = {}
    for source in sources:
        for name, value in source.items():
            values.setdefault(name, set()).add(value)
    return {name: _partition_type(known - {None}) for name, known in values.items()}


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

"""`Listing`: which files an input is made of.

An input is a file, a directory, a glob, or a list of these, local or behind any fsspec URL, all on
one storage. Of directories and globs only Parquet files are taken, without those whose name, or
folder, begins with `_` or `.`. A directory that `datasets` has saved is taken by its own list of
files. `hf:OWNER/NAME?split=SPLIT` is the Parquet that the hub makes of its datasets.

Sources are named by their path below the root: the folder that is named, the one of the file, the
one before the first `*`; of a list the deepest that all have in common.

Not covered: datasets of the hub of which it has converted only a part: name their own files, as
`hf://datasets/OWNER/NAME/data/train-*.parquet`.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec

from gc2ray.config import HUB
from gc2ray.errors import STORAGE_ERRORS, ConfigError
from gc2ray.patience import Patience

PARQUET, ARROW = ".parquet", ".arrow"
HUB_KEYS = {"split", "subset"}
SAVED_FILES, SAVED_SPLITS = "state.json", "dataset_dict.json"
_KEY = "recipe.input.uri"


@dataclass(frozen=True)
class Place:
    """An entry of an input: a path or pattern on a storage, and the root of its sources."""

    filesystem: Any
    root: str
    path: str

    @staticmethod
    def of(uri: str, patience: Patience) -> Place:
        """Where an entry is.

        Raises:
            ConfigError: No such storage, it does not answer, or no such way to name a dataset.
        """
        try:
            filesystem, path = fsspec.core.url_to_fs(_hub_url(uri) if _is_hub(uri) else uri)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{_KEY}: {error}") from error
        if "*" in path or "?" in path:
            fixed = path[: min(path.find(mark) for mark in "*?" if mark in path)]
            return Place(filesystem, posixpath.dirname(fixed), path)
        is_file = path.endswith((PARQUET, ARROW)) and not _is_directory(filesystem, path, patience)
        return Place(filesystem, posixpath.dirname(path) if is_file else path.rstrip("/"), path)

    def files(self, patience: Patience) -> list[str]:
        """Paths of its files, in order.

        Args:
            patience: With a storage in trouble.

        Raises:
            ConfigError: The storage does not answer, or what is there is no input.
        """
        try:
            return patience.call(f"listing {self.path}", lambda: sorted(self._files()))
        except FileNotFoundError:
            return []
        except STORAGE_ERRORS as error:
            raise ConfigError(f"{_KEY}: {self.path}: {error}") from error

    def _files(self) -> Iterator[str]:
        if "*" in self.path or "?" in self.path:
            yield from self._visible(self.filesystem.glob(self.path))
        elif self.root != self.path.rstrip("/"):
            # A file that is named is meant, whatever its name.
            yield from [self.path] if self.filesystem.exists(self.path) else []
        elif self.filesystem.exists(f"{self.root}/{SAVED_SPLITS}"):
            splits = self._told(SAVED_SPLITS, lambda told: told["splits"])
            raise ConfigError(
                f"{_KEY}: {self.root} holds the splits {', '.join(splits)}; name one of them, as "
                f"{self.root}/{splits[0]}"
            )
        elif self.filesystem.exists(f"{self.root}/{SAVED_FILES}"):
            yield from self._saved()
        else:
            yield from self._visible(self.filesystem.find(self.path))

    def _visible(self, found: Sequence[str]) -> Iterator[str]:
        for path in found:
            parts = posixpath.relpath(path, self.root).split("/")
            hidden = any(part.startswith(("_", ".")) for part in parts)
            if path.endswith(PARQUET) and not hidden:
                yield path

    def _saved(self) -> Iterator[str]:
        """Files of a dataset that was saved: beside them may lie others, of its cache."""
        names = self._told(SAVED_FILES, lambda t: [file["filename"] for file in t["_data_files"]])
        yield from (f"{self.root}/{posixpath.basename(name)}" for name in names)

    def _told(self, name: str, names: Callable[[Any], Iterable[str]]) -> list[str]:
        """Names that a file of `datasets` tells.

        Raises:
            ConfigError: It does not.
        """
        try:
            told = json.loads(self.filesystem.cat_file(f"{self.root}/{name}"))
            return list(map(str, names(told)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{_KEY}: {self.root}/{name}: not written by datasets") from error


@dataclass(frozen=True)
class Listing:
    """An input on its storage.

    Attributes:
        filesystem: The storage.
        root: What sources are named below.
        places: The entries.
        patience: With the storage in trouble.
    """

    filesystem: Any
    root: str
    places: tuple[Place, ...]
    patience: Patience

    @staticmethod
    def of(uris: Sequence[str], patience: Patience) -> Listing:
        """Where an input is; nothing is listed yet.

        Raises:
            ConfigError: There is no such storage, or several.
        """
        places = tuple(Place.of(uri, patience) for uri in uris)
        first = places[0].filesystem
        if any(place.filesystem != first for place in places):
            raise ConfigError(f"{_KEY}: its entries are on different storages; copy, or run twice")
        root = posixpath.commonpath([place.root for place in places])
        return Listing(first, root if len(places) > 1 else places[0].root, places, patience)

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
            found = (path for place in self.places for path in place.files(self.patience))
            yield list(dict.fromkeys(found))
        finally:
            self.filesystem.invalidate_cache()

    def source(self, path: str) -> str:
        """What a file is called in answers."""
        return posixpath.relpath(path, self.root)

    def path(self, source: str) -> str:
        """The inverse of `source`."""
        return posixpath.normpath(posixpath.join(self.root, source))


def _is_directory(filesystem: Any, path: str, patience: Patience) -> bool:
    try:
        return bool(patience.call(f"asking for {path}", lambda: filesystem.isdir(path)))
    except STORAGE_ERRORS as error:
        raise ConfigError(f"{_KEY}: {path}: {error}") from error


def _is_hub(uri: str) -> bool:
    return uri.startswith(HUB) and not uri.startswith(f"{HUB}//")


def _hub_url(uri: str) -> str:
    """The converted files of a dataset of the hub.

    Raises:
        ConfigError: Not `hf:OWNER/NAME?split=SPLIT`, perhaps with a subset.
    """
    parts = urlsplit(uri)
    asked = parse_qs(parts.query)
    if parts.path.count("/") > 1 or "split" not in asked or not {*asked} <= HUB_KEYS:
        raise ConfigError(
            f"{_KEY}: {uri} is not of the form hf:OWNER/NAME?split=SPLIT&subset=SUBSET, where "
            "subset may be left out"
        )
    subset = asked.get("subset", ["default"])[0]
    converted = f"{parts.path}@refs/convert/parquet/{subset}/{asked['split'][0]}"
    return f"hf://datasets/{converted}/*{PARQUET}"

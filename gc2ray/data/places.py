"""`Place`: an entry of an input, which is a file, a folder or a pattern, and what it takes.

A file that is named is taken, whatever it is called. Of a folder and all below it, Parquet files
are; of a pattern, what it says, and of one with an open end, as `part-*`, Parquet files too, if
there are any. Names that begin with `_` or `.` are left out, as are folders that do, unless the
pattern spells that out.

`[`, `?` and `*` are characters where what they are part of exists as it stands. On local disks
linked folders are followed, save into a folder that they lie in. A URL of the web is a folder if it
ends in `/`, and a pattern only if it has `*` and no query; it is not asked what it is, because
that may mean to fetch it.

Not covered: links on remote file systems, which are as those follow them.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from gc2ray.core.config.locations import HUB
from gc2ray.core.errors import ConfigError, storage_errors
from gc2ray.data.retries import RetryPolicy
from gc2ray.data.storage import protocols, storage_of

PARQUET, ARROW = ".parquet", ".arrow"
URI_KEY = "recipe.input.uri"
HUB_KEYS = {"split", "subset"}
SAVED_FILES, SAVED_SPLITS = "state.json", "dataset_dict.json"
WEB = {"http", "https"}
_MARKS = re.compile(r"[*?[]")
_OPEN_END = re.compile(r"[*?\]]$")
_HIDING = ("_", ".")
_ALIKE = re.compile(r"\.(parquet|parq|pq)(\.|$)", re.IGNORECASE)
"""In a name that is probably a Parquet file's, though it does not end in `.parquet`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pattern:
    """Names below a folder, by components; `**` are any folders, also none.

    Attributes:
        text: The pattern, relative to the folder.
    """

    text: str

    @cached_property
    def _components(self) -> list[str]:
        return self.text.split("/")

    @cached_property
    def _regexes(self) -> list[re.Pattern[str]]:
        return [re.compile(glob_translate(part)) for part in self._components]

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        return re.compile(glob_translate(self.text))

    @property
    def has_open_end(self) -> bool:
        """Whether it does not say how names end."""
        return _OPEN_END.search(self.text) is not None

    def matches(self, parts: Sequence[str]) -> bool:
        """Whether a name is meant.

        Args:
            parts: Its components, below the folder.
        """
        if self == EVERYTHING:  # also what has an empty component, which is no folder to a regex
            return not self._hides(parts)
        return not self._hides(parts) and self._whole.match("/".join(parts)) is not None

    def goes_into(self, parts: Sequence[str]) -> bool:
        """Whether something below a folder may be meant."""
        if self._hides(parts):
            return False
        for part, component, regex in zip(parts, self._components, self._regexes, strict=False):
            if component == "**":
                return True
            if not regex.match(part):
                return False
        return len(parts) < len(self._components)

    def may_go_on(self, parts: Sequence[str]) -> bool:
        """Whether it has no end below a folder: then loops have to be cut there."""
        return "**" in self._components[: len(parts) + 1]

    def _hides(self, parts: Sequence[str]) -> bool:
        shown = tuple(mark for mark in _HIDING if any(c.startswith(mark) for c in self._components))
        return any(part.startswith(_HIDING) and not part.startswith(shown) for part in parts)


EVERYTHING = Pattern("**/*")


@dataclass(frozen=True)
class Place:
    """An entry of an input.

    Attributes:
        filesystem: The storage.
        root: The folder that its sources are named below.
        path: A file; empty where it is none.
        pattern: What is taken below the root, if it is no file.
    """

    filesystem: Any
    root: str
    path: str = ""
    pattern: Pattern = EVERYTHING

    @staticmethod
    def from_uri(uri: str, retry_policy: RetryPolicy) -> Place:
        """Where an entry is.

        Raises:
            ConfigError: No such storage, it does not answer, or no such way to name a dataset.
        """
        try:
            filesystem, path = storage_of(_hub_url(uri) if _is_hub(uri) else uri)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"{URI_KEY}: {error}") from error
        try:
            if is_web(filesystem):
                return _of_web(filesystem, path)
            if _is_hub(uri):
                root, _, names = path.rpartition("/")
                return Place(filesystem, root, pattern=Pattern(names))
            path = _located(path) if is_local(filesystem) else path
            return retry_policy.call(f"asking for {path}", lambda: _of(filesystem, path))
        except storage_errors() as error:
            raise ConfigError(f"{URI_KEY}: {path}: {error}") from error

    def files(self, retry_policy: RetryPolicy) -> list[str]:
        """Paths of its files, in order; of a local file one, also where it has several names.

        Args:
            retry_policy: With a storage in trouble.

        Raises:
            ConfigError: The storage does not answer, or what is there is no input.
        """
        try:
            found = retry_policy.call(f"listing {self.shown}", lambda: list(self._files()))
        except FileNotFoundError:
            return []
        except _listing_errors() as error:
            raise ConfigError(f"{URI_KEY}: {self.shown}: {error}") from error
        return sorted(self._each_once(found) if is_local(self.filesystem) else found)

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether one of some files would be one of its, if it were there.

        Args:
            folder: That they are below, as the storage spells it.
            names: Theirs, below that.
        """
        if not is_local(self.filesystem):
            return any(self._takes(f"{folder.rstrip('/')}/{name}") for name in names)
        files = [f"{os.path.realpath(folder)}/{name}" for name in names]
        if self.path:
            return os.path.realpath(self.path) in files
        walked = (path for path, is_folder in _walk(self.root, self.pattern) if is_folder)
        for inside in (self.root, *walked):  # by every link that leads to them
            above = f"{os.path.realpath(inside or '/').rstrip('/')}/"
            below = [file.removeprefix(above) for file in files if file.startswith(above)]
            if any(self._takes(f"{inside}/{name}") for name in below):
                return True
        return False

    @property
    def shown(self) -> str:
        """The entry, for people."""
        whole = self.root if self.pattern == EVERYTHING else f"{self.root}/{self.pattern.text}"
        return self.path or whole or "/"

    @property
    def _glob(self) -> str:
        return f"{glob.escape(self.root)}/{self.pattern.text}"

    def _files(self) -> Iterator[str]:
        if self.path:
            # What is there and cannot be read is told when it is read.
            there = is_web(self.filesystem) or self.filesystem.exists(self.path)
            yield from [self.path] if there else []
        elif self.pattern == EVERYTHING and self._is_saved():
            yield from self._saved()
        else:
            yield from self._of_pattern()

    def _of_pattern(self) -> Iterator[str]:
        found = [
            (path, is_folder)
            for path, is_folder in self._entries()
            if path.startswith(f"{self.root}/") and self.pattern.matches(self._parts(path))
        ]
        files = [path for path, is_folder in found if not is_folder]
        if not self.pattern.has_open_end:
            yield from files
            for path, is_folder in found:
                if is_folder:  # Spark calls folders like files
                    yield from Place(self.filesystem, path)._of_pattern()
            return
        folders = [path for path, is_folder in found if is_folder]
        if folders and "**" not in self.pattern.text:
            log.warning(
                "%s: %d folders match, too, and nothing of them is read (%s); if they are input, "
                "name what is in them, as %s/*%s",
                self.shown,
                len(folders),
                posixpath.basename(folders[0]),
                self.shown,
                PARQUET,
            )
        parquet = [path for path in files if path.lower().endswith(PARQUET)]
        if self.pattern != EVERYTHING and not parquet:
            yield from files
            return
        yield from parquet
        taken = {*parquet}
        others = [path for path in files if path not in taken and _ALIKE.search(path)]
        if others:
            log.warning(
                "%s: %d files are left out whose names do not end in %s (%s); name them, or a "
                "pattern with their ending, if they are input",
                self.shown,
                len(others),
                PARQUET,
                posixpath.basename(others[0]),
            )

    def _entries(self) -> Iterator[tuple[str, bool]]:
        """What may be meant, and whether it is a folder."""
        if is_local(self.filesystem):
            yield from _walk(self.root, self.pattern)
        elif self.pattern == EVERYTHING:
            folder = f"{self.root}/" if is_web(self.filesystem) else self.root
            yield from ((path, False) for path in self.filesystem.find(folder))
        else:
            found = self.filesystem.glob(self._glob, detail=True)
            yield from ((path, info["type"] == "directory") for path, info in found.items())

    def _parts(self, path: str) -> list[str]:
        return path.removeprefix(f"{self.root}/").split("/")

    def _takes(self, name: str) -> bool:
        if self.path:
            return name == self.path
        inside = name.startswith(f"{self.root}/") and self.pattern.matches(self._parts(name))
        return inside and (not self.pattern.has_open_end or name.endswith(PARQUET))

    def _each_once(self, paths: Sequence[str]) -> list[str]:
        """One name for each local file: one without links below the root, if there is one."""
        names: dict[str, str] = {}
        above = os.path.realpath(self.root or "/").rstrip("/")
        for path in sorted(paths):
            real = os.path.realpath(path)
            if real not in names or real == f"{above}{path.removeprefix(self.root)}":
                names[real] = path
        return list(names.values())

    def _is_saved(self) -> bool:
        """Whether `datasets` has saved a dataset here.

        Raises:
            ConfigError: It has saved several, its splits.
        """
        if self.filesystem.exists(f"{self.root}/{SAVED_SPLITS}"):
            splits = self._told(SAVED_SPLITS, lambda told: told["splits"])
            raise ConfigError(
                f"{URI_KEY}: {self.root} holds the splits {', '.join(splits)}; name one of them, "
                f"as {self.root}/{splits[0]}"
            )
        return bool(self.filesystem.exists(f"{self.root}/{SAVED_FILES}"))

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
            raise ConfigError(f"{URI_KEY}: {self.root}/{name}: not written by datasets") from error


def is_local(filesystem: Any) -> bool:
    """Whether a storage is this machine's disks."""
    return isinstance(filesystem, LocalFileSystem)


def is_web(filesystem: Any) -> bool:
    """Whether a storage is the web, whose names are URLs."""
    return bool(WEB & set(protocols(filesystem)))


def _of(filesystem: Any, path: str) -> Place:
    """A place of any storage but the web."""
    if not _MARKS.search(path) or filesystem.exists(path):
        if filesystem.isdir(path):
            return Place(filesystem, path.rstrip("/"))
        return Place(filesystem, path.rpartition("/")[0], path)
    parts, fixed = path.split("/"), 0
    for number, part in enumerate(parts):
        if _MARKS.search(part) and not filesystem.isdir("/".join(parts[: number + 1])):
            break
        fixed = number + 1
    pattern = Pattern("/".join(parts[fixed:]))
    return Place(filesystem, "/".join(parts[:fixed]), pattern=pattern)


def _of_web(filesystem: Any, url: str) -> Place:
    plain, has_query, _ = url.partition("?")
    if "*" in plain and not has_query:
        root = plain[: plain.index("*")].rpartition("/")[0]
        return Place(filesystem, root, pattern=Pattern(plain.removeprefix(f"{root}/")))
    if plain.endswith("/") and not has_query:
        return Place(filesystem, plain.rstrip("/"))
    return Place(filesystem, plain.rpartition("/")[0], url)


def _located(path: str) -> str:
    """A local path without `.`, `..` and doubled slashes; `..` is taken of where a link leads."""
    before, dots, rest = path.rpartition("/..")
    if dots and rest[:1] in ("", "/"):
        path = f"{os.path.realpath(before + dots)}{rest}"
    return os.path.normpath(path)


def _walk(folder: str, pattern: Pattern) -> Iterator[tuple[str, bool]]:
    """What is below a local folder where a pattern may match, and whether it is a folder.

    Raises:
        OSError: A folder cannot be listed.
    """
    first: tuple[str, tuple[str, ...], tuple[str, ...]] = (
        folder,
        (),
        (os.path.realpath(folder or "/"),),
    )
    pending = [first]
    while pending:
        path, parts, above = pending.pop()
        with os.scandir(path or "/") as entries:
            for entry in entries:
                below, is_folder = (*parts, entry.name), entry.is_dir()
                yield f"{path}/{entry.name}", is_folder
                if is_folder and pattern.goes_into(below):
                    real = os.path.realpath(entry.path)
                    if real not in above or not pattern.may_go_on(below):
                        pending.append((f"{path}/{entry.name}", below, (*above, real)))
                elif entry.is_symlink() and not Path(entry.path).exists():
                    log.warning("%s: a link that leads nowhere; nothing is read there", entry.path)


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
            f"{URI_KEY}: {uri} is not of the form hf:OWNER/NAME?split=SPLIT&subset=SUBSET, where "
            "subset may be left out"
        )
    subset = asked.get("subset", ["default"])[0]
    converted = f"{parts.path}@refs/convert/parquet/{subset}/{asked['split'][0]}"
    return f"hf://datasets/{converted}/*{PARQUET}"


def _listing_errors() -> tuple[type[Exception], ...]:
    """What a listing raises; s3fs refuses a pattern over all buckets with `ValueError`."""
    return (*storage_errors(), ValueError)

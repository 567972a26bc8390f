"""`InputEntry`: one entry of an input (file, folder or pattern) and the files that it selects.

A file that is named is read under any name. A folder selects the Parquet files in it and below it.
A pattern selects what it matches; one with an open end, such as `part-*`, selects only Parquet
files if it matches any. Files and folders whose names begin with `_` or `.` are left out, unless
the pattern spells that character out.

`[`, `?` and `*` are plain characters if a path with them exists. On local disks, linked folders are
followed, except into a folder that contains the link. A web URL is a folder if it ends in `/`, and
a pattern only if it has `*` and no query; the server is not asked, because that could fetch it.

Not covered: links on remote filesystems, which those filesystems follow or not.
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

PARQUET = ".parquet"
URI_KEY = "recipe.input.uri"
HUB_KEYS = {"split", "subset"}
SAVED_FILES, SAVED_SPLITS = "state.json", "dataset_dict.json"
WEB = {"http", "https"}
_MARKS = re.compile(r"[*?[]")
_OPEN_END = re.compile(r"[*?\]]$")
_HIDING = ("_", ".")
_ALIKE = re.compile(r"\.(parquet|parq|pq)(\.|$)", re.IGNORECASE)
"""Matches names of probable Parquet files that do not end in `.parquet`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pattern:
    """A pattern of names below a folder; `**` stands for any number of folders.

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
        """Whether the pattern leaves open how names end."""
        return _OPEN_END.search(self.text) is not None

    def matches(self, parts: Sequence[str]) -> bool:
        """Whether a name matches.

        Args:
            parts: Components of the name, relative to the folder.
        """
        if self == EVERYTHING:  # also names with an empty component, which the regex does not match
            return not self._hides(parts)
        return not self._hides(parts) and self._whole.match("/".join(parts)) is not None

    def goes_into(self, parts: Sequence[str]) -> bool:
        """Whether a name below a folder may match."""
        if self._hides(parts):
            return False
        for part, component, regex in zip(parts, self._components, self._regexes, strict=False):
            if component == "**":
                return True
            if not regex.match(part):
                return False
        return len(parts) < len(self._components)

    def has_any_depth(self, parts: Sequence[str]) -> bool:
        """Whether names of any depth below a folder may match, so that loops must be cut there."""
        return "**" in self._components[: len(parts) + 1]

    def _hides(self, parts: Sequence[str]) -> bool:
        shown = tuple(mark for mark in _HIDING if any(c.startswith(mark) for c in self._components))
        return any(part.startswith(_HIDING) and not part.startswith(shown) for part in parts)


EVERYTHING = Pattern("**/*")


@dataclass(frozen=True)
class InputEntry:
    """An entry of an input.

    Attributes:
        filesystem: The storage.
        root: The folder that names of sources are relative to.
        path: Path of a file; empty if the entry is not a file.
        pattern: Pattern of the files below the root, if the entry is not a file.
    """

    filesystem: Any
    root: str
    path: str = ""
    pattern: Pattern = EVERYTHING

    @staticmethod
    def from_uri(uri: str, retry_policy: RetryPolicy) -> InputEntry:
        """The entry that a path or URL names.

        Raises:
            ConfigError: The storage is unknown or does not answer, or the entry is malformed.
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
                return InputEntry(filesystem, root, pattern=Pattern(names))
            path = _located(path) if is_local(filesystem) else path
            return retry_policy.call(f"asking for {path}", lambda: _of(filesystem, path))
        except storage_errors() as error:
            raise ConfigError(f"{URI_KEY}: {path}: {error}") from error

    def files(self, retry_policy: RetryPolicy) -> list[str]:
        """Paths of its files, sorted; a local file with several names appears once.

        Args:
            retry_policy: How long temporary trouble of the storage is waited out.

        Raises:
            ConfigError: The storage does not answer, or the files are not an input.
        """
        try:
            paths = retry_policy.call(f"listing {self.shown}", lambda: list(self._files()))
        except FileNotFoundError:
            return []
        except _listing_errors() as error:
            raise ConfigError(f"{URI_KEY}: {self.shown}: {error}") from error
        return sorted(self._each_once(paths) if is_local(self.filesystem) else paths)

    def would_take(self, folder: str, names: Sequence[str]) -> bool:
        """Whether the entry would select one of some files, if it existed.

        Args:
            folder: Path of a folder on the storage.
            names: Names of the files, relative to it.
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
            # A file that exists but cannot be read is reported when it is read.
            there = is_web(self.filesystem) or self.filesystem.exists(self.path)
            yield from [self.path] if there else []
        elif self.pattern == EVERYTHING and self._is_saved():
            yield from self._saved()
        else:
            yield from self._of_pattern()

    def _of_pattern(self) -> Iterator[str]:
        entries = [
            (path, is_folder)
            for path, is_folder in self._entries()
            if path.startswith(f"{self.root}/") and self.pattern.matches(self._parts(path))
        ]
        files = [path for path, is_folder in entries if not is_folder]
        if not self.pattern.has_open_end:
            yield from files
            for path, is_folder in entries:
                if is_folder:  # Spark calls folders like files
                    yield from InputEntry(self.filesystem, path)._of_pattern()
            return
        folders = [path for path, is_folder in entries if is_folder]
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
        """Paths that may match, and whether each is a folder."""
        if is_local(self.filesystem):
            yield from _walk(self.root, self.pattern)
        elif self.pattern == EVERYTHING:
            folder = f"{self.root}/" if is_web(self.filesystem) else self.root
            yield from ((path, False) for path in self.filesystem.find(folder))
        else:
            matches = self.filesystem.glob(self._glob, detail=True)
            yield from ((path, info["type"] == "directory") for path, info in matches.items())

    def _parts(self, path: str) -> list[str]:
        return path.removeprefix(f"{self.root}/").split("/")

    def _takes(self, name: str) -> bool:
        if self.path:
            return name == self.path
        inside = name.startswith(f"{self.root}/") and self.pattern.matches(self._parts(name))
        return inside and (not self.pattern.has_open_end or name.endswith(PARQUET))

    def _each_once(self, paths: Sequence[str]) -> list[str]:
        """One name for each local file: if possible one without links below the root."""
        names: dict[str, str] = {}
        above = os.path.realpath(self.root or "/").rstrip("/")
        for path in sorted(paths):
            real = os.path.realpath(path)
            if real not in names or real == f"{above}{path.removeprefix(self.root)}":
                names[real] = path
        return list(names.values())

    def _is_saved(self) -> bool:
        """Whether the library `datasets` saved a dataset here.

        Raises:
            ConfigError: It saved several splits.
        """
        if self.filesystem.exists(f"{self.root}/{SAVED_SPLITS}"):
            splits = self._names_in(SAVED_SPLITS, lambda content: content["splits"])
            raise ConfigError(
                f"{URI_KEY}: {self.root} holds the splits {', '.join(splits)}; name one of them, "
                f"as {self.root}/{splits[0]}"
            )
        return bool(self.filesystem.exists(f"{self.root}/{SAVED_FILES}"))

    def _saved(self) -> Iterator[str]:
        """The files of a saved dataset; files of its cache may lie beside them."""
        names = self._names_in(
            SAVED_FILES, lambda t: [file["filename"] for file in t["_data_files"]]
        )
        yield from (f"{self.root}/{posixpath.basename(name)}" for name in names)

    def _names_in(self, name: str, names: Callable[[Any], Iterable[str]]) -> list[str]:
        """Names in a file that `datasets` wrote.

        Raises:
            ConfigError: Something else wrote the file.
        """
        try:
            content = json.loads(self.filesystem.cat_file(f"{self.root}/{name}"))
            return list(map(str, names(content)))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{URI_KEY}: {self.root}/{name}: not written by datasets") from error


def is_local(filesystem: Any) -> bool:
    """Whether a storage is a local disk."""
    return isinstance(filesystem, LocalFileSystem)


def is_web(filesystem: Any) -> bool:
    """Whether a storage is the web, where paths are URLs."""
    return bool(WEB & set(protocols(filesystem)))


def _of(filesystem: Any, path: str) -> InputEntry:
    """An entry on any storage but the web."""
    if not _MARKS.search(path) or filesystem.exists(path):
        if filesystem.isdir(path):
            return InputEntry(filesystem, path.rstrip("/"))
        return InputEntry(filesystem, path.rpartition("/")[0], path)
    parts, fixed = path.split("/"), 0
    for number, part in enumerate(parts):
        if _MARKS.search(part) and not filesystem.isdir("/".join(parts[: number + 1])):
            break
        fixed = number + 1
    pattern = Pattern("/".join(parts[fixed:]))
    return InputEntry(filesystem, "/".join(parts[:fixed]), pattern=pattern)


def _of_web(filesystem: Any, url: str) -> InputEntry:
    plain, has_query, _ = url.partition("?")
    if "*" in plain and not has_query:
        root = plain[: plain.index("*")].rpartition("/")[0]
        return InputEntry(filesystem, root, pattern=Pattern(plain.removeprefix(f"{root}/")))
    if plain.endswith("/") and not has_query:
        return InputEntry(filesystem, plain.rstrip("/"))
    return InputEntry(filesystem, plain.rpartition("/")[0], url)


def _located(path: str) -> str:
    """A local path without `.`, `..` and doubled slashes; `..` is the parent of a link's target."""
    before, dots, rest = path.rpartition("/..")
    if dots and rest[:1] in ("", "/"):
        path = f"{os.path.realpath(before + dots)}{rest}"
    return os.path.normpath(path)


def _walk(folder: str, pattern: Pattern) -> Iterator[tuple[str, bool]]:
    """Paths below a local folder that a pattern may match, and whether each is a folder.

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
                    if real not in above or not pattern.has_any_depth(below):
                        pending.append((f"{path}/{entry.name}", below, (*above, real)))
                elif entry.is_symlink() and not Path(entry.path).exists():
                    log.warning("%s: a broken link; nothing is read there", entry.path)


def _is_hub(uri: str) -> bool:
    return uri.startswith(HUB) and not uri.startswith(f"{HUB}//")


def _hub_url(uri: str) -> str:
    """The URL of the Parquet files that the hub made of a dataset.

    Raises:
        ConfigError: The entry is not `hf:OWNER/NAME?split=SPLIT`, perhaps with a subset.
    """
    parts = urlsplit(uri)
    query = parse_qs(parts.query)
    if parts.path.count("/") > 1 or "split" not in query or not {*query} <= HUB_KEYS:
        raise ConfigError(
            f"{URI_KEY}: {uri} is not of the form hf:OWNER/NAME?split=SPLIT&subset=SUBSET; subset "
            "may be left out"
        )
    subset = query.get("subset", ["default"])[0]
    converted = f"{parts.path}@refs/convert/parquet/{subset}/{query['split'][0]}"
    return f"hf://datasets/{converted}/*{PARQUET}"


def _listing_errors() -> tuple[type[Exception], ...]:
    """What a listing raises; s3fs refuses a pattern over all buckets with `ValueError`."""
    return (*storage_errors(), ValueError)

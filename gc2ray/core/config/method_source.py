"""Compression methods that are not part of gc2ray: their source files and digests.

Such a method is named `package.module:Class`, or by an entry point of the group `gc2ray.methods`
of an installed package. Finding its file runs none of its code and imports no package above it, so
that a recipe can be read without either.

Not covered: a digest of what the module imports, its package included; modules in zip files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

ENTRY_POINTS = "gc2ray.methods"
_NAME = r"[^\W\d]\w*"
_DOTTED = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")


@dataclass(frozen=True)
class MethodSource:
    """The source of a method.

    Attributes:
        module: Its full name.
        class_name: Name of the class in it.
        file: The module's file.
        sha256: Digest of that file.
    """

    module: str
    class_name: str
    file: Path
    sha256: str

    @property
    def root(self) -> Path:
        """What has to be copied to import the module elsewhere: a file, or a package's folder."""
        depth = self.module.count(".")
        if self.file.name == "__init__.py":
            return self.file.parents[depth]
        return self.file.parents[depth - 1] if depth else self.file

    def check_class(self) -> None:
        """Refuse a module without the class, as far as its source tells without running it.

        Raises:
            LookupError: The module binds no such name, or is not Python.
        """
        try:
            nodes = list(ast.walk(ast.parse(self.file.read_bytes())))
        except (SyntaxError, ValueError) as error:
            raise LookupError(f"{self.file} is not valid Python: {error}") from error
        names = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        names |= {node.id for node in nodes if isinstance(node, ast.Name)}
        names |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
        if not names & {self.class_name.split(".")[0], "*", "__getattr__"}:
            raise LookupError(f"{self.file} has no class {self.class_name!r}")


def source_digest(data: bytes) -> str:
    """The digest of a source file, by which a recipe names it."""
    return hashlib.sha256(data).hexdigest()


def is_dotted(method: str) -> bool:
    """Whether a method is named by a path, `package.module:Class`, and not by an entry point."""
    return ":" in method


def entry_point_names() -> list[str]:
    """Names of the methods that installed packages bring."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def find_method(method: str) -> MethodSource:
    """Find the source of a method, without running any of it.

    Raises:
        LookupError: There is no such method; the message says what is missing.
    """
    point = _entry_point(method)
    file = _source_file(point.module)
    if file is None:
        raise LookupError(
            f"no module {point.module!r} with a source file on the Python path or in "
            f"{Path.cwd()}; install it, or add its folder to PYTHONPATH"
        )
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LookupError(f"{file} cannot be read: {error.strerror}") from error
    return MethodSource(point.module, point.attr, file, source_digest(data))


def _entry_point(method: str) -> EntryPoint:
    """The module and the class that a method's name stands for.

    Raises:
        LookupError: It is neither a dotted path nor an entry point.
    """
    points = entry_points(group=ENTRY_POINTS, name=method)
    if points:
        point = next(iter(points))
    elif is_dotted(method):
        point = EntryPoint(method, method, ENTRY_POINTS)
    else:
        raise LookupError(f"no installed package has an entry point {method!r} in {ENTRY_POINTS}")
    if not _DOTTED.fullmatch(point.value):
        raise LookupError(f"{point.value!r} is not written package.module:Class")
    return point


def _source_file(module: str) -> Path | None:
    """The file of a module; None if there is no such module, or it has no source file.

    Raises:
        LookupError: It is in a namespace package below another.
    """
    importlib.invalidate_caches()
    parts = module.split(".")
    folders: Sequence[str] | None = None
    spec = None
    for depth in range(len(parts)):
        if depth and folders is None:  # what is above it is no package
            return None
        try:
            spec = _spec(".".join(parts[: depth + 1]), folders)
        except KeyError as error:  # Python looks for the parent, which is not imported
            raise LookupError(
                f"{module!r}: a folder above it has no __init__.py; add one"
            ) from error
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    if spec is None or not spec.has_location or not str(spec.origin).endswith(".py"):
        return None
    return Path(str(spec.origin)).absolute()


def _spec(name: str, folders: Sequence[str] | None) -> ModuleSpec | None:
    """As Python's own import finds it, and at last in the working directory."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, folders)
        if spec is not None:
            return spec
    return PathFinder.find_spec(name, [str(Path.cwd())]) if folders is None else None

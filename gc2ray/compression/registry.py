"""Compression methods, one file each, and their registry.

To add one to gc2ray: a frozen dataclass in a file of its own (see `methods/local.py`), a line in
`COMPRESSORS` and one in `gc2ray.core.config.compression`, a row in the table of methods in the
docs. The contract tests run over the registry.

Methods of one's own stay outside (see `examples/custom_method.py`): a recipe names them by an entry
point or a dotted path, and they are imported here, if their source is that of the recipe.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from gc2ray.compression.base import Compressor
from gc2ray.compression.methods.average_pool import AveragePool
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.methods.globalcom2_reference import GlobalCom2Reference
from gc2ray.compression.methods.local import Local
from gc2ray.compression.methods.none import NoCompression
from gc2ray.compression.methods.random import Random
from gc2ray.compression.methods.thumbnail import ThumbnailOnly
from gc2ray.compression.methods.uniform import Uniform
from gc2ray.core.config.compression import CUSTOM, METHODS, CompressionConfig
from gc2ray.core.config.method_source import MethodSource, source_digest
from gc2ray.core.errors import ConfigError, first_line

_SHA256 = "__gc2ray_sha256__"
"""Attribute of a module of one's own: the digest of the source that it was imported from."""

COMPRESSORS: dict[str, type[Compressor]] = {
    method.name: method
    for method in (
        GlobalCom2, GlobalCom2Reference, NoCompression, Random, Uniform, Local, ThumbnailOnly,
        AveragePool,
    )
}  # fmt: skip


def build(method: str, **settings: float) -> Compressor:
    """A method of gc2ray with those of the settings that it takes.

    Raises:
        KeyError: No such method.
        ValueError: A setting is out of range.
    """
    return _built(COMPRESSORS[method], METHODS[method].settings, settings)


def build_configured(config: CompressionConfig) -> Compressor:
    """The method of a configuration, which may be one's own, with its settings.

    Raises:
        ConfigError: It is one's own, and its source is not that of the recipe, or it cannot be
            used.
    """
    settings = {"retention": config.retention, "temperature": config.temperature}
    source = config.source()
    if source is None:
        return build(config.method, **settings)
    try:
        cls = _imported_class(source)
        taken = [field.name for field in fields(cls) if field.name in CUSTOM.settings]  # type: ignore[arg-type]  # checked
        return _built(cls, taken, settings)
    except Exception as error:  # somebody else's code: it may raise anything
        said = first_line(error)
        reason = said if isinstance(error, _Unusable) else f"{type(error).__name__}: {said}"
        raise ConfigError(
            f"recipe.compression.method: {config.method} ({source.file}) cannot be used: {reason}"
        ) from error


class _Unusable(Exception):  # noqa: N818 - says of a class that it is no method
    """A class is no compression method; the message says why."""


def _built(cls: Any, taken: Iterable[str], settings: Mapping[str, float]) -> Compressor:
    compressor: Compressor = cls(**{name: settings[name] for name in taken if name in settings})
    return compressor


def _imported_class(source: MethodSource) -> type[Compressor]:
    """The class of a method of one's own.

    Raises:
        _Unusable: It is no compression method.
        Exception: Whatever its module raises while it is imported.
    """
    method = getattr(_imported(source), source.class_name, None)
    if method is None:
        raise _Unusable(f"the module has no {source.class_name}")
    if not (isinstance(method, type) and issubclass(method, Compressor)):
        raise _Unusable(f"{source.class_name} is not a gc2ray.compression.base.Compressor")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise _Unusable(f"{source.class_name} does not define {missing}")
    if not isinstance(getattr(method, "name", None), str):
        raise _Unusable(f"{source.class_name} has no name; answers carry it")
    if "retention" not in getattr(method, "__dataclass_fields__", ()):
        raise _Unusable(f"{source.class_name} is no dataclass with a field retention")
    if method.name in METHODS:
        raise _Unusable(f"its name is {method.name!r}, that of a method of gc2ray")
    return method


class _SourceOnly(SourceFileLoader):
    """Runs a source file, and never bytecode that an older one left beside it."""

    def __init__(self, source: MethodSource) -> None:
        super().__init__(source.module, str(source.file))
        self._sha256 = source.sha256

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 - as Python calls it
        data = self.get_data(self.path)
        if source_digest(data) != self._sha256:
            raise _Unusable("the file changed while it was read")
        return self.source_to_code(data, self.path)


def _imported(source: MethodSource) -> ModuleType:
    """The module, run from the very bytes whose digest the recipe has.

    A module that something else imported, perhaps before the file was edited, is replaced.
    """
    module = sys.modules.get(source.module)
    if module is not None:
        if getattr(module, _SHA256, None) == source.sha256:
            return module
        imported = Path(str(getattr(module, "__file__", None))).absolute()
        if imported != source.file:
            raise _Unusable(f"Python imports {source.module} from {imported}")
    with _working_directory_importable():
        parent = source.module.rpartition(".")[0]
        if parent:
            importlib.import_module(parent)
        spec = spec_from_file_location(source.module, source.file, loader=_SourceOnly(source))
        if spec is None or spec.loader is None:
            raise _Unusable(f"{source.file} is not a Python file")
        module = module_from_spec(spec)
        sys.modules[source.module] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[source.module]
            raise
    setattr(module, _SHA256, source.sha256)
    return module


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """With the working directory on the Python path, behind everything else."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)

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
from pathlib import Path
from types import ModuleType
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
from gc2ray.core.config.method_source import MethodSource
from gc2ray.core.errors import ConfigError

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
        reason = error if isinstance(error, _Unusable) else f"{type(error).__name__}: {error}"
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
    found = getattr(_imported(source), source.class_name, None)
    if found is None:
        raise _Unusable(f"the module has no {source.class_name}")
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise _Unusable(f"{source.class_name} is not a gc2ray.compression.base.Compressor")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise _Unusable(f"{source.class_name} does not define {missing}")
    if not isinstance(getattr(found, "name", None), str):
        raise _Unusable(f"{source.class_name} has no name; answers carry it")
    if "retention" not in getattr(found, "__dataclass_fields__", ()):
        raise _Unusable(f"{source.class_name} is no dataclass with a field retention")
    return found


def _imported(source: MethodSource) -> ModuleType:
    """The module, as its source is now: one that was changed since its import is imported again."""
    with _working_directory_importable():
        module = importlib.import_module(source.module)
        if getattr(module, _SHA256, source.sha256) != source.sha256:
            module = importlib.reload(module)
    imported = Path(str(module.__file__)).absolute()
    if imported != source.file:
        raise _Unusable(f"Python imports {source.module} from {imported}")
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

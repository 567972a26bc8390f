"""gc2ray: offline captioning and question answering with compressed high-resolution VLMs on Ray.

`import gc2ray` loads none of the libraries behind it; each name is loaded at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gc2ray.core.version import __version__

if TYPE_CHECKING:
    from gc2ray.api.jobs import check, estimate, load_job, run, submit, tune
    from gc2ray.api.outputs import compact, evaluate, report, retry, show, status, verify
    from gc2ray.api.standalone import supported_models
    from gc2ray.core.config.job import Cluster, Job
    from gc2ray.core.config.recipe import Recipe
    from gc2ray.core.errors import ConfigError, EngineDead, GivenUp, Interrupted
    from gc2ray.core.records import Answer, Request
    from gc2ray.engine.local_model import Model, load_model
    from gc2ray.output.compact import read_answers

__all__ = [
    "Answer",
    "Cluster",
    "ConfigError",
    "EngineDead",
    "GivenUp",
    "Interrupted",
    "Job",
    "Model",
    "Recipe",
    "Request",
    "__version__",
    "check",
    "compact",
    "estimate",
    "evaluate",
    "load_job",
    "load_model",
    "read_answers",
    "report",
    "retry",
    "run",
    "show",
    "status",
    "submit",
    "supported_models",
    "tune",
    "verify",
]

_MODULES = {
    "Answer": "gc2ray.core.records",
    "Cluster": "gc2ray.core.config.job",
    "ConfigError": "gc2ray.core.errors",
    "EngineDead": "gc2ray.core.errors",
    "GivenUp": "gc2ray.core.errors",
    "Interrupted": "gc2ray.core.errors",
    "Job": "gc2ray.core.config.job",
    "Model": "gc2ray.engine.local_model",
    "Recipe": "gc2ray.core.config.recipe",
    "Request": "gc2ray.core.records",
    "check": "gc2ray.api.jobs",
    "compact": "gc2ray.api.outputs",
    "estimate": "gc2ray.api.jobs",
    "evaluate": "gc2ray.api.outputs",
    "load_job": "gc2ray.api.jobs",
    "load_model": "gc2ray.engine.local_model",
    "read_answers": "gc2ray.output.compact",
    "report": "gc2ray.api.outputs",
    "retry": "gc2ray.api.outputs",
    "run": "gc2ray.api.jobs",
    "show": "gc2ray.api.outputs",
    "status": "gc2ray.api.outputs",
    "submit": "gc2ray.api.jobs",
    "supported_models": "gc2ray.api.standalone",
    "tune": "gc2ray.api.jobs",
    "verify": "gc2ray.api.outputs",
}
"""Modules of public names."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

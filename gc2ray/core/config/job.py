"""A job, from one YAML: its `Recipe` (what; fingerprinted) and its `Cluster` (how; free on resume).

Unknown keys are refused with their path and the nearest valid key. Defaults live in the models of
this folder and nowhere else. Everything is checked before Ray starts or a GPU is touched; what is
wrong is a `ConfigError`.

Not covered: environment variables and secrets. Credentials come from the storage's own chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator, model_validator

from gc2ray.core.config.input import MIB
from gc2ray.core.config.locations import check_location, is_url
from gc2ray.core.config.recipe import (
    Recipe,
)
from gc2ray.core.config.yaml_models import (
    Frozen,
    apply_override,
    parsed,
    read_yaml,
)
from gc2ray.core.errors import ConfigError

Seconds = Annotated[float, Field(gt=0)]


class WorkerRange(Frozen):
    """How many workers: more are added while shards wait, and removed when none do.

    Attributes:
        min: The run is given up if the cluster has no room for this many.
        max: Most workers at a time.
    """

    min: int = Field(default=1, gt=0)
    max: int = Field(gt=0)

    @model_validator(mode="after")
    def _check_order(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}")
        return self


class Cluster(Frozen):
    """How it is computed; may change between a run and its rerun.

    Attributes:
        workers: Number of worker processes, or {min, max}; None is one per GPU share, or one
            without GPUs.
        gpus_per_worker: Share of a GPU; None is 1 where the cluster has GPUs and 0 where not.
        cpus_per_worker: Ray's CPU reservation, and the torch threads of a CPU worker.
        image_threads: Threads of a worker that decode images. If null, this and the four settings
            below are derived from model, memory and cores.
        views_per_batch: Views encoded and compressed together.
        kv_tokens: Tokens of prompts and answers that may be in the KV cache together.
        prefill_tokens: Prompt tokens that are read together.
        live_rows: Rows that are decoded together; None is as many as their tokens allow.
        host_memory_bytes: Undecoded input that a worker may hold, besides the Parquet pages that it
            is read from.
        shard_rows: Rows of a shard; None sizes shards by calibration.
        shard_seconds: Work in a shard, by calibration.
        tries: Failed attempts after which a shard is given up; four deaths of its workers without
            a known cause count as one.
        max_poison_rows: Rows of a shard that may kill a worker, or hang, before the shard is given
            up.
        max_bad_rows: Share of answers that may fail. If more do, a run stops once it has 200
            answers, and in any case ends with exit code 1. 1 accepts any share.
        stall_seconds: A worker that gives no answer for so long is killed.
        place_seconds: Time to find room for a worker in the cluster.
        load_seconds: Time to load the model, counted from the last progress.
        drain_seconds: Time for shards in flight to be committed when the run has to stop; Ray
            kills a job 3 s after asking it to stop.
    """

    workers: WorkerRange | None = None
    gpus_per_worker: float | None = Field(default=None, ge=0)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    image_threads: int | None = Field(default=None, gt=0)
    views_per_batch: int | None = Field(default=None, gt=0)
    kv_tokens: int | None = Field(default=None, gt=0)
    prefill_tokens: int | None = Field(default=None, gt=0)
    live_rows: int | None = Field(default=None, gt=0)
    host_memory_bytes: int = Field(default=512 * MIB, gt=0)
    shard_rows: int | None = Field(default=None, gt=0)
    shard_seconds: Seconds = 45.0
    tries: int = Field(default=3, gt=0)
    max_poison_rows: int = Field(default=8, ge=0)
    max_bad_rows: float = Field(default=0.05, ge=0, le=1)
    stall_seconds: Seconds = 600.0
    place_seconds: Seconds = 600.0
    load_seconds: Seconds = 900.0
    drain_seconds: float = Field(default=2.0, ge=0)

    @field_validator("workers", mode="before")
    @classmethod
    def _as_many_as_fit(cls, workers: object) -> object:
        """A plain number is as many as there is room for, up to that."""
        if isinstance(workers, str) or (isinstance(workers, int) and workers < 1):
            raise ValueError("expected a number above 0, or {min: …, max: …}")
        return {"max": workers} if isinstance(workers, int | float) else workers


class _ClusterOnly(Frozen):
    cluster: Cluster = Cluster()


class Job(Frozen):
    """A recipe, a cluster, and where the answers go.

    Attributes:
        output: Directory or any fsspec URL of the answers.
        recipe: What is computed.
        cluster: How it is computed.
    """

    output: str
    recipe: Recipe
    cluster: Cluster = Cluster()

    def located(self) -> Job:
        """The same with absolute local paths: workers have other working directories."""
        recipe = self.recipe
        roots = tuple(_absolute(root) for root in recipe.input.image_roots)
        uri = recipe.input.uri
        uri = _absolute(uri) if isinstance(uri, str) else tuple(map(_absolute, uri))
        where = {"uri": uri, "image_roots": roots}
        model = recipe.model
        if model.is_local:
            model = model.model_copy(update={"path": _absolute(model.path)})
        what = {"input": recipe.input.model_copy(update=where), "model": model}
        located = {"output": _absolute(self.output), "recipe": recipe.model_copy(update=what)}
        return self.model_copy(update=located)

    def to_yaml(self) -> str:
        """As a file that `load_job` reads, every setting written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def check_portable(self) -> None:
        """Refuse what means something else on another machine.

        Raises:
            ConfigError: A local path is not absolute.
        """
        locations = _locations(self)
        if not self.recipe.model.is_local:
            del locations["recipe.model.path"]
        for key, values in locations.items():
            for value in values:
                if not is_url(value) and not Path(value).is_absolute():
                    raise ConfigError(
                        f"{key}: {value!r} is a path of this machine; the cluster needs a URL, or "
                        "an absolute path that all its nodes share"
                    )


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a YAML and apply `a.b=c` overrides.

    Raises:
        ConfigError: Not readable, an unknown key, or a value out of range.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys output, recipe, cluster at the top")
    for override in overrides:
        apply_override(Job, data, override)
    return parse_job(data)


def load_cluster(overrides: Sequence[str]) -> Cluster:
    """A cluster from `cluster.b=c` overrides alone, where the recipe is already settled.

    Raises:
        ConfigError: An unknown key, one of the recipe, or a value out of range.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        if not str(override).startswith("cluster."):
            raise ConfigError(f"{override!r}: the run has its recipe; only cluster.* may be set")
        apply_override(_ClusterOnly, data, override)
    return parsed(_ClusterOnly, data).cluster


def parse_job(data: Mapping[str, Any]) -> Job:
    """A job from plain data.

    Raises:
        ConfigError: As `load_job`.
    """
    job = parsed(Job, data)
    for key, locations in _locations(job).items():
        for location in locations:
            check_location(key, location)
    return job


def _absolute(location: str) -> str:
    """A local path made absolute; URLs stay as they are."""
    return location if is_url(location) else str(Path(location).expanduser().absolute())


def _locations(job: Job) -> dict[str, list[str]]:
    """Every path or URL of a job, by its setting."""
    recipe = job.recipe
    return {
        "output": [job.output],
        "recipe.model.path": [recipe.model.path],
        "recipe.input.uri": list(recipe.input.uris()),
        "recipe.input.image_roots": list(recipe.input.image_roots),
    }

"""One YAML, two halves: `Recipe` (what; fingerprinted) and `Cluster` (how; free on resume).

Unknown keys are refused with their path and the nearest valid key. Defaults live here and nowhere
else. Everything is checked before Ray starts or a GPU is touched; what is wrong is a `ConfigError`.

Not covered: environment variables and secrets. Credentials come from the storage's own chain.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gc2ray.core.config.generation_rules import RULES, TakenOver
from gc2ray.core.config.methods import METHODS, Method, Newlines, Positions
from gc2ray.core.config.strict_yaml import joined, load, load_value
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import ANSWER_COLUMNS, Sampling
from gc2ray.data.image_bytes import ImagePolicy
from gc2ray.data.storage import is_local_path
from gc2ray.models.chat_template import PromptSource

MIB = 1024 * 1024
M = TypeVar("M", bound=BaseModel)
HUB = "hf:"
"""Datasets of the Hugging Face hub begin so, see `gc2ray.data.listing`."""
Seconds = Annotated[float, Field(gt=0)]
MAX_PROBLEMS = 20
"""Of a configuration, that are told at once."""
_SHOWN = 300
"""Characters of a value that are told: aliases make gigabytes of a few lines of YAML."""
_SCHEME = re.compile(r"([A-Za-z][\w+.-]+):(/*)")
_STORAGES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "http", "https", "file"}
_VARIABLE = re.compile(r"(?:^|/)\$(?:\w|\{)")


class Frozen(BaseModel):
    """A model of a configuration: cannot be changed; refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: object) -> object:
        """No setting is true or false, which YAML also reads from `on` and `no`."""
        if isinstance(value, bool):
            raise ValueError("true and false (yes, no, on, off) are no value of it")
        return value


class ModelConfig(Frozen):
    """The model: directory, hub id or any fsspec URL.

    `adapter` and `quantization` are not supported yet.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    adapter: None = None
    quantization: None = None

    @property
    def is_url(self) -> bool:
        """Whether it is behind an fsspec URL."""
        return _is_url(self.path)

    @property
    def is_local(self) -> bool:
        """Whether it is, or should be, a directory here; what is none of both is a hub id."""
        named = self.path.startswith((".", "/", "~")) or Path(self.path).is_dir()
        return named and not self.is_url

    def check(self) -> None:
        """Look for the model as far as that needs neither network nor its libraries.

        Raises:
            ConfigError: `path` is a local one, and there is no model.
        """
        if self.is_local and not (Path(self.path).expanduser() / "config.json").is_file():
            raise ConfigError(f"recipe.model.path: there is no model in {self.path}")


class CompressionConfig(Frozen):
    """The compression method and its settings; `retention` is the fraction KEPT.

    `positions` and `newlines` name the packing (`gc2ray.compression.packing.Packing`). By default
    tokens are numbered as they are read, and every canvas row that keeps a token ends in a newline,
    as in the paper.
    """

    method: str = "globalcom2"
    retention: float = Field(default=0.25, gt=0, le=1)
    temperature: float = Field(default=10.0, gt=0)
    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(_unknown(method, sorted(METHODS)))
        return method

    @property
    def kind(self) -> Method:
        """What is known of the method."""
        return METHODS[self.method]

    @property
    def retention_requested(self) -> float:
        """What the method was asked to keep: 1.0 where it has no retention to set."""
        return self.retention if self.kind.takes_retention else 1.0

    @property
    def keeps_everything(self) -> bool:
        """Whether images are left as they are."""
        return self.retention >= self.kind.whole_from


class GenerationConfig(Frozen):
    """How answers are drawn, and where they end.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 is greedy.
        top_p: Tokens are drawn from the fewest whose probability reaches this.
        seed: Mixed with each row's own.
        stop_token_ids: Tokens that end an answer, beside the model's own.
        max_repeats: An answer whose last tokens (a run of up to 64, at least 16 in all) repeat
            more often than this is cut there; its `finish_reason` is `repetition`. None: never.
        repetition_penalty: What logits of tokens that prompt or answer already have are divided by
            (multiplied with where they are negative), as in transformers. None: 1, which is none.
        ignore_model_rules: Rules of the model's generation_config.json, by name, that answers are
            not to follow. Any other that gc2ray does not follow is refused.
    """

    max_new_tokens: int = Field(default=64, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    max_repeats: int | None = Field(default=None, gt=0)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ignore_model_rules: tuple[str, ...] = ()

    @field_validator("ignore_model_rules")
    @classmethod
    def _known_rules(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in RULES:
                raise ValueError(_unknown(name, sorted(RULES)))
        return names

    def taken_over(self) -> TakenOver:
        """What the model's files have no say in."""
        own = {"repetition_penalty"} if self.repetition_penalty is not None else set()
        return TakenOver(frozenset(self.ignore_model_rules) | own, self.stop_token_ids)

    def sampling(self) -> Sampling:
        """How an answer is drawn; its seed is still the recipe's."""
        settings = self.model_dump(exclude={"ignore_model_rules"}, exclude_none=True)
        return Sampling(**settings)

    def mixed(self, seed: int) -> int:
        """A row's or an image's seed, mixed with the recipe's."""
        return seed ^ self.seed


class PromptConfig(Frozen):
    """Exactly one of a column, a template over columns (`"{question}"`), or a constant.

    A column of lists gives each row several prompts, and an answer to each.
    """

    column: str | None = None
    template: str | None = None
    constant: str | None = None

    @model_validator(mode="after")
    def _one(self) -> PromptConfig:
        self.source()
        return self

    def source(self) -> PromptSource:
        """The same as what renders rows."""
        return PromptSource(self.column, self.template, self.constant)


class InputConfig(Frozen):
    """The rows.

    Attributes:
        uri: Parquet file, directory or glob, local or any fsspec URL; a directory that `datasets`
            has saved; `hf:OWNER/NAME?split=SPLIT`; or a list of these.
        image: Column of images: struct of bytes and path, binary, or path.
        prompt: Where the prompt comes from.
        keep: Input columns written back with the answers; `{answer: reference}` is one that is
            written under another name, here the input's `answer` as `reference`.
        image_roots: Directories or URL prefixes under which image paths may be read.
        max_image_bytes: Larger files are refused, row by row.
        max_image_pixels: Larger images are refused by their header.
    """

    uri: str | Annotated[tuple[str, ...], Field(min_length=1)]
    image: str = "image"
    prompt: PromptConfig
    keep: tuple[str | dict[str, str], ...] = ()
    image_roots: tuple[str, ...] = ()
    max_image_bytes: int = Field(default=64 * MIB, gt=0)
    max_image_pixels: int = Field(default=80_000_000, gt=0)

    @model_validator(mode="after")
    def _images(self) -> InputConfig:
        self.image_policy()
        return self

    @field_validator("keep")
    @classmethod
    def _free(cls, keep: tuple[str | dict[str, str], ...]) -> tuple[str | dict[str, str], ...]:
        if any(isinstance(item, dict) and len(item) != 1 for item in keep):
            raise ValueError("a renamed column is written {column: name}, each by itself")
        names = [name for name, _ in map(_renamed, keep)]
        taken = [name for name in names if name in ANSWER_COLUMNS]
        if taken:
            raise ValueError(
                f"{taken[0]!r} is a column of the answers; write it under another name, as "
                f"{{{taken[0]}: input_{taken[0]}}}"
            )
        if len(set(names)) < len(names):
            raise ValueError("a column is named twice")
        return keep

    def uris(self) -> tuple[str, ...]:
        """Where the rows are: one place or several."""
        return (self.uri,) if isinstance(self.uri, str) else self.uri

    def image_policy(self) -> ImagePolicy:
        """Limits for untrusted images."""
        return ImagePolicy(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            roots=self.image_roots,
        )

    def columns(self) -> tuple[str, ...]:
        """The input columns that are read."""
        kept = self.kept().values()
        return tuple(dict.fromkeys([self.image, *self.prompt.source().columns(), *kept]))

    def kept(self) -> dict[str, str]:
        """Columns that are written back: by the name they are written under, the input's own."""
        return dict(map(_renamed, self.keep))


class AuditConfig(Frozen):
    """A second look at some rows, which are answered uncompressed, too.

    Attributes:
        share: Of the prompts; which ones, depends on their keys alone.
        escalate: Retentions, rising, at which one whose answers disagree is answered anew, until
            one agrees: that, or else the last, is the row's answer. Empty: none is.
        min_agreement: Answers that are less alike disagree.
    """

    share: float = Field(default=0.0, ge=0, le=1)
    escalate: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    min_agreement: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _rising(self) -> AuditConfig:
        if list(self.escalate) != sorted(set(self.escalate)):
            raise ValueError("escalate: retentions must rise, one after the other")
        if self.escalate and not self.share:
            raise ValueError("escalate needs a share above 0: only audited rows are answered anew")
        return self


class Recipe(Frozen):
    """What is computed. Two runs into one output must have the same."""

    model: ModelConfig
    compression: CompressionConfig = CompressionConfig()
    generation: GenerationConfig = GenerationConfig()
    audit: AuditConfig = AuditConfig()
    input: InputConfig

    @model_validator(mode="after")
    def _something_to_audit(self) -> Recipe:
        if self.audit.share and self.compression.keeps_everything:
            raise ValueError("audit.share is above 0, but nothing is compressed; set it to 0")
        lowest = min(self.audit.escalate, default=None)
        if lowest is not None and lowest <= self.compression.retention:
            raise ValueError(
                f"audit.escalate: {lowest:g} is not above the retention of the compression, "
                f"{self.compression.retention:g}"
            )
        if self.audit.escalate and not self.compression.kind.takes_retention:
            raise ValueError(f"audit.escalate: {self.compression.method} has no retention to raise")
        return self

    def rungs(self) -> dict[str, CompressionConfig]:
        """Compressions with which audited rows that disagree are answered anew, by name."""
        return {
            f"retention {retention:g}": self.compression.model_copy(update={"retention": retention})
            for retention in self.audit.escalate
        }

    def fingerprint(self) -> str:
        """Digest of every setting that is not its default: new settings change no old recipe."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


class WorkerRange(Frozen):
    """How many workers: more are added while shards wait, fewer are kept when none do.

    Attributes:
        min: The run gives up where there is no room for so many.
        max: Never more.
    """

    min: int = Field(default=1, gt=0)
    max: int = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min}, more than max, {self.max}")
        return self


class Cluster(Frozen):
    """How it is computed; may change between a run and its rerun.

    Attributes:
        workers: Worker processes, or {min, max}; None is one per GPU share, or one without GPUs.
        gpus_per_worker: Share of a GPU; None is 1 where the cluster has GPUs and 0 where not.
        cpus_per_worker: Ray's CPU reservation, and the torch threads of a CPU worker.
        image_threads: Threads of a worker that decode images. This and the four below are derived
            from model, memory and cores where they are None, see `gc2ray.engine.batch_sizes`.
        views_per_batch: Views encoded and compressed together.
        kv_tokens: Tokens of prompts and answers that may be in the KV cache together.
        prefill_tokens: Prompt tokens that are read together.
        live_rows: Rows that are decoded together; None is as many as their tokens allow.
        host_memory_bytes: Undecoded input that a worker may hold, beside the pages it is read from
            (see `gc2ray.data.formats.parquet`).
        shard_rows: Rows of a shard; None sizes shards by calibration.
        shard_seconds: The calibrated size.
        tries: Losses of a shard that taught nothing before it is given up; four deaths of its
            workers in which no row is found guilty count as one.
        max_poison_rows: Rows of a shard that may kill a worker, or hang, before it is given up.
        max_bad_rows: Share of answers that may fail. More of them stop a run, from 200 answers on,
            and however few it has, it ends with exit code 1. 1 accepts any.
        stall_seconds: A worker that gives no answer for so long is killed.
        place_seconds: Time to find room for a worker in the cluster.
        load_seconds: Time to load the model, counted anew whenever it reads on.
        drain_seconds: Time for shards in flight to be committed when the run is told to stop; Ray
            kills a job 3 s after it asked it to.
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
    """A recipe, a cluster, and where the answers go: a directory or any fsspec URL."""

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
        places = _places(self)
        if not self.recipe.model.is_local:
            del places["recipe.model.path"]
        for key, values in places.items():
            for value in values:
                if not _is_url(value) and not Path(value).is_absolute():
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
        _apply(Job, data, override)
    return parse_job(data)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: It cannot be read, is no YAML, or has a key twice.
    """
    try:
        return load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def load_cluster(overrides: Sequence[str]) -> Cluster:
    """A cluster from `cluster.b=c` overrides alone, where the recipe is already settled.

    Raises:
        ConfigError: An unknown key, one of the recipe, or a value out of range.
    """
    data: dict[str, Any] = {}
    for override in overrides:
        if not override.startswith("cluster."):
            raise ConfigError(f"{override!r}: the run has its recipe; only cluster.* may be set")
        _apply(_ClusterOnly, data, override)
    return parsed(_ClusterOnly, data).cluster


def parse_job(data: Mapping[str, Any]) -> Job:
    """A job from plain data.

    Raises:
        ConfigError: As `load_job`.
    """
    job = parsed(Job, data)
    for key, places in _places(job).items():
        for place in places:
            check_place(key, place)
    return job


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as stored with a run.

    Raises:
        ConfigError: As `load_job`.
    """
    return parsed(Recipe, data)


def recipe_difference(stored: Recipe, yours: Recipe) -> list[str]:
    """The settings that differ, one readable line each."""
    a, b = dict(_leaves(stored.model_dump())), dict(_leaves(yours.model_dump()))
    return [
        f"recipe.{key}: {a.get(key)!r} (stored) -> {b.get(key)!r} (yours)"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]


def check_place(key: str, place: str) -> None:
    """Refuse a path or URL that would be taken for something else.

    Args:
        key: The setting that names it.
        place: What it says.

    Raises:
        ConfigError: It is empty, a URL without its slashes, or has in it what a shell would have
            replaced.
    """
    if not place.strip() or "\0" in place:
        raise ConfigError(f"{key}: {place!r} is no path and no URL")
    for part in [] if is_local_path(place) else place.split("::"):
        found = _SCHEME.match(part)
        slashes = len(found.group(2)) if found else 2
        if found and (slashes == 1 or (not slashes and found.group(1).lower() in _STORAGES)):
            root = "/" if found.group(1) == "file" else ""
            meant = f"{found.group(1)}://{root}{part[found.end() :]}"
            raise ConfigError(f"{key}: {place!r} is no URL; did you mean {meant!r}?")
    if _VARIABLE.search(place):
        raise ConfigError(
            f"{key}: {place!r} names a variable, which nothing expands in a configuration; write "
            "the path out"
        )
    try:
        Path(place).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{key}: {place!r}: there is no such user here; {error}") from error


def _places(job: Job) -> dict[str, list[str]]:
    """Every path or URL of a job, by its setting."""
    recipe = job.recipe
    return {
        "output": [job.output],
        "recipe.model.path": [recipe.model.path],
        "recipe.input.uri": list(recipe.input.uris()),
        "recipe.input.image_roots": list(recipe.input.image_roots),
    }


def _renamed(kept: str | dict[str, str]) -> tuple[str, str]:
    """The name that a kept column is written under, and its own."""
    if isinstance(kept, str):
        return kept, kept
    ((column, name),) = kept.items()
    return name, column


def _absolute(place: str) -> str:
    """A local path made absolute; URLs stay as they are."""
    return place if _is_url(place) else str(Path(place).expanduser().absolute())


def _is_url(place: str) -> bool:
    """Whether fsspec is asked; what begins as a local path is one, see `gc2ray.data.storage`."""
    if is_local_path(place):
        return False
    return "://" in place or "::" in place or place.startswith(HUB)


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _apply(model: type[BaseModel], data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r}: overrides are written a.b=c")
    for key in keys[:-1]:
        below = data.get(key)
        if below is None:  # not there, or a section without anything in it
            below = data[key] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{override!r}: {key} has no keys below it")
        data = below
    try:
        data[keys[-1]] = _value(_kinds(model, keys), text)
    except ValueError as error:
        raise ConfigError(
            f"{override!r}: {text!r} is not valid YAML: {error}; text with any of : # [ {{ in it "
            "goes into quotes there"
        ) from error


def _kinds(model: type[BaseModel], keys: Sequence[str]) -> set[Any]:
    """What a setting may be; nothing where there is none of that name."""
    kinds: set[Any] = {model}
    for key in keys:
        models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        fields = models[0].model_fields if models else {}
        if key not in fields:
            return set()
        kind = fields[key].annotation
        kinds = {*get_args(kind)} if get_origin(kind) in (Union, UnionType) else {kind}
    return kinds


def _value(kinds: set[Any], text: str) -> Any:
    """What somebody typed, as a value of one of some kinds.

    Text is taken as it stands, to the last blank; everything else is YAML.

    Raises:
        ValueError: It is not.
    """
    if text in ("", "null"):
        return None
    texts = {kind for kind in kinds if kind is str or get_origin(kind) is Literal}
    if texts and texts == kinds - {NoneType}:
        return text
    if str not in texts:
        return load_value(text)
    try:
        found = load_value(text) if text.startswith("[") else text
    except ValueError:
        return text
    return found if isinstance(found, list) else text


def parsed(model: type[M], data: Mapping[str, Any]) -> M:
    """Data as what it should be.

    Raises:
        ConfigError: It is not; a line for each problem, with its path and the nearest valid key.
    """
    try:
        found = model.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(model, problem) for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"and {len(problems) - MAX_PROBLEMS} more problems")
        raise ConfigError("\n".join(lines)) from error
    _check_characters(found)
    return found


def _check_characters(found: BaseModel) -> None:
    """Refuse text that cannot be written anywhere: bytes of a shell that are no characters.

    Raises:
        ConfigError: There is some; the message names its setting.
    """
    for key, value in _leaves(found.model_dump()):
        for text in value if isinstance(value, tuple) else (value,):
            try:
                joined(text if isinstance(text, str) else "").encode()
            except ValueError as error:
                raise ConfigError(f"{key}: {text!a} is not text: {error}") from error


def _explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path) or "configuration"
    if problem["type"] == "extra_forbidden":
        owner = _model_at(model, path[:-1])
        return f"{where}: {_unknown(path[-1], list(owner.model_fields))}"
    if problem["type"] == "missing":
        return f"{where}: required, and not set"
    if problem["type"] == "none_required":
        return f"{where}: not supported yet; leave it null"
    given = problem["input"]
    unquoted = problem["type"] == "string_type" and not isinstance(given, list | dict | None)
    hint = " (in quotes it is text)" if unquoted else ""
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{hint}; got {_shown(given)}"


def _shown(value: object) -> str:
    """A value for people: at most a few hundred characters of it."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 10, 10, 10
    short.maxstring = short.maxother = _SHOWN
    text = short.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _model_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for key in path:
        if key.isdigit():  # a place in a list of them
            continue
        kind = model.model_fields[key].annotation
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        model = kind
    return model


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {key!r}; {hint}"

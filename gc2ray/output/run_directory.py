"""The output directory: its `Run` (`run.json`) and its rounds.

Round 0 is the output itself. Round N is the directory `retry_rounds/N` in it, with the same layout:
`run.json`, `plan/`, `data/`, `dead/`, `workers/`, `model.json`. No round changes another.

Not covered: which round's answer counts (`gc2ray.output.latest`).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gc2ray.core.config.recipe import Recipe, parse_recipe, recipe_difference
from gc2ray.core.errors import ConfigError
from gc2ray.core.shards import bytes_digest
from gc2ray.core.version import __version__
from gc2ray.data.store import Store, json_bytes
from gc2ray.output.plan import PLAN_NAME, Plan, follows, plan_name

FORMAT = 3
"""Format of a run and its plan; raised if this version would resume an older run differently.

2: kept columns have the types that come back from Parquet. 3: retries are in `retry_rounds/N`."""
VERSIONED = ("ray", "torch", "transformers", "pyarrow", "pillow")
RUN_NAME = "run.json"

RETRY_ROUNDS = "retry_rounds"
MODEL_NAME = "model.json"
"""Holds the digest of the first worker's model."""
_RETRY = re.compile(rf"{RETRY_ROUNDS}/([1-9]\d*)$")


@dataclass(frozen=True, eq=False)
class Round:
    """A round of an output that was begun: its plan is stored.

    Attributes:
        number: 0, or the number of the retry.
        store: Its directory.
        run: The content of its `run.json`.
        plan: Its plan, with all extensions.
        model: Digest of its model; None if no worker has loaded one yet.
    """

    number: int
    store: Store
    run: Run
    plan: Plan
    model: str | None

    def name(self, name: str) -> str:
        """The name of one of its objects, relative to the output."""
        return object_name(self.number, name)


def object_name(number: int, name: str = "") -> str:
    """The name, relative to the output, of an object of a round, or of its directory."""
    folder = f"{RETRY_ROUNDS}/{number}" if number else ""
    return "/".join(part for part in (folder, name) if part)


def round_store(output: str, number: int) -> Store:
    """The directory of a round of an output."""
    return Store(f"{output.rstrip('/')}/{object_name(number)}" if number else output)


def retry_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the retries among the names in `retry_rounds/`, in order."""
    matches = [_RETRY.match(name) for name in names]
    return sorted(int(match.group(1)) for match in matches if match)


def stored_run(store: Store) -> Run | None:
    """The run of a directory; None if none was begun.

    Raises:
        ConfigError: `run.json` is damaged; the message begins with its name.
    """
    data = store.read(RUN_NAME)
    return None if data is None else Run.from_bytes(data)


def stored_digest(store: Store) -> str | None:
    """The digest of the model of a round; None if no worker has loaded one yet.

    Raises:
        ConfigError: `model.json` is damaged; the message begins with its name.
    """
    data = store.read(MODEL_NAME)
    try:
        return None if data is None else str(json.loads(data)["digest"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{MODEL_NAME}: not written by gc2ray, or damaged") from error


def open_run(output: str) -> tuple[Store, Run]:
    """The directory of an output, and the run that it holds.

    Raises:
        ConfigError: The storage cannot be used, there is no run, or `run.json` is damaged.
    """
    store = round_store(output, 0)
    store.check_usable(writing=False)
    try:
        run = stored_run(store)
    except ConfigError as error:  # a command may read several outputs
        raise ConfigError(f"{output}: {error}") from error
    if run is None:
        raise ConfigError(f"{output}: there is no run here (no {RUN_NAME})")
    return store, run


def open_first_round(output: str) -> Round:
    """Round 0 of an output.

    Raises:
        ConfigError: As `open_run`, or the plan or `model.json` is damaged.
    """
    return _with_plan(0, *open_run(output))


def dead_letters(store: Store) -> list[tuple[str, str]]:
    """The dead letters of a round: the sid of the shard and the name of the object, in order."""
    return [(name.split("/")[1].split(".")[0], name) for name in store.names("dead")]


def dead_letter_reason(dead_letter: bytes) -> str:
    """Why a shard was given up.

    Raises:
        ValueError, KeyError, TypeError: The data is not a dead letter.
    """
    return str(json.loads(dead_letter)["reason"])


def open_round(output: str, number: int) -> Round | None:
    """A round of an output; None if it was not begun.

    Raises:
        ConfigError: `run.json`, the plan or `model.json` is damaged; the message begins with its
            name.
    """
    store = round_store(output, number)
    run = stored_run(store)
    return None if run is None else _with_plan(number, store, run)


def _with_plan(number: int, store: Store, run: Run) -> Round:
    return Round(number, store, run, frozen_plan(store, run), stored_digest(store))


def frozen_plan(store: Store, run: Run) -> Plan:
    """The whole plan that a run names, with its extensions.

    Raises:
        ConfigError: It is missing, or has another digest; the message begins with its name.
    """
    data = store.read(PLAN_NAME)
    if data is None:
        raise ConfigError(f"{PLAN_NAME}: missing, and {RUN_NAME} names it")
    if bytes_digest(data) != run.plan_digest:
        raise ConfigError(f"{PLAN_NAME}: not the one that {RUN_NAME} names")
    plan = Plan.from_bytes(data)
    if (run.shards, run.rows) != (len(plan.shards), plan.rows):
        raise ConfigError(
            f"{RUN_NAME}: names {run.shards} shards with {run.rows} rows, but the plan has "
            f"{len(plan.shards)} with {plan.rows}"
        )
    for name, extension in extensions(store, data):
        try:
            plan = plan.extended(Plan.from_bytes(extension))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    return plan


def extensions(store: Store, plan: bytes) -> Iterator[tuple[str, bytes]]:
    """The files that extend a plan, with their names, in order.

    Args:
        store: The directory.
        plan: The first file of the plan.

    Raises:
        ConfigError: A file does not extend the one before; the message begins with its name.
    """
    before, before_name = bytes_digest(plan), PLAN_NAME
    for number, name in enumerate(store.names("plan")[1:], 1):
        data = store.read(name) or b""
        if name != plan_name(number) or follows(data) != before:
            raise ConfigError(f"{name}: does not extend {before_name}; move it away")
        yield name, data
        before, before_name = bytes_digest(data), name


@dataclass(frozen=True)
class Run:
    """The content of `run.json`: recipe, plan, versions."""

    recipe: Recipe
    plan_digest: str
    shards: int
    rows: int
    versions: dict[str, str]
    format: int = FORMAT

    @staticmethod
    def from_plan(recipe: Recipe, plan: Plan, plan_data: bytes) -> Run:
        """The run of a stored plan, with the versions of this process."""
        versions = {name: importlib.metadata.version(name) for name in VERSIONED}
        versions |= {"gc2ray": __version__, "python": sys.version.split()[0]}
        return Run(recipe, bytes_digest(plan_data), len(plan.shards), plan.rows, versions)

    def to_bytes(self) -> bytes:
        """The run as JSON."""
        content: dict[str, Any] = {
            "format": self.format,
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_fingerprint": self.recipe.fingerprint(),
            "plan": {"file": PLAN_NAME, "sha256": self.plan_digest},
            "shards": self.shards,
            "rows": self.rows,
            "versions": self.versions,
        }
        return json_bytes(content)

    @staticmethod
    def from_bytes(data: bytes) -> Run:
        """The inverse of `to_bytes`.

        Raises:
            ConfigError: The data is not a run, or of another version.
        """
        try:
            content = json.loads(data)
            if content["format"] != FORMAT:
                raise _other_format(content)
            return Run(
                recipe=_stored_recipe(content["recipe"]),
                plan_digest=content["plan"]["sha256"],
                shards=content["shards"],
                rows=content["rows"],
                versions=content["versions"],
            )
        except (ValueError, KeyError, TypeError) as error:  # not JSON, or not ours
            raise ConfigError(f"{RUN_NAME}: not written by gc2ray, or damaged") from error

    def check(self, recipe: Recipe) -> None:
        """Refuse another recipe.

        Raises:
            ConfigError: Names every setting that differs.
        """
        lines = recipe_difference(self.recipe, recipe)
        if lines:
            raise ConfigError(
                "the output directory belongs to another recipe; choose a new output, or return to "
                "the stored settings:\n  " + "\n  ".join(lines)
            )


def _stored_recipe(content: dict[str, Any]) -> Recipe:
    """The recipe of a `run.json`, which names the source of its method if that is not gc2ray's.

    Reading a recipe fills in a digest that is missing, so a run without one would accept any
    module of that name.

    Raises:
        ConfigError: The digest is missing, or the recipe is not valid.
    """
    recipe = parse_recipe(content)
    if recipe.compression.source_sha256 != content["compression"].get("source_sha256"):
        raise ConfigError(f"{RUN_NAME}: lacks the digest of its compression method's source")
    return recipe


def _other_format(content: dict[str, Any]) -> ConfigError:
    number, version = content["format"], content["versions"]["gc2ray"]
    age = "an older" if number < FORMAT else "a newer"
    return ConfigError(
        f"{RUN_NAME}: begun by {age} gc2ray, {version} (format {number}); this is {__version__} "
        f"(format {FORMAT}): choose a new output, or resume with that version"
    )

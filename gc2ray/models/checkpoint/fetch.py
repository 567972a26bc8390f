"""`fetch_model`: a model on this node's disk, and the digest that says which model it is.

A directory is used in place. A hub id goes through the hub's own cache, a URL into
`~/.cache/gc2ray/models` (`GC2RAY_CACHE` in the environment names another folder than
`~/.cache/gc2ray`), under the hash of the URL and of its listing: a model that changes is another
model. One process of a node fetches and the others wait for it. A fetched model gets its name once
it is complete. Only files that loading reads are fetched: never pickles, never code.

A model that is missing or forbidden is a `ConfigError`; a failing network and a full disk are an
`OSError` (or botocore's, see `storage_errors`), because another worker or node may succeed.

Transient errors of a storage are retried (`gc2ray.data.retries`); the hub's client retries by
itself.

Not covered: models that are not used any more (delete them). If a hub's branch moves while workers
start, some of them fetch another model, which they refuse by its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from gc2ray.core.config.generation import NOTHING, TakenOver
from gc2ray.core.config.recipe import ModelConfig
from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.cache import (
    FETCHED,
    JITTER_SECONDS,
    LEFT_OUT,
    Tick,
    check_disk_space,
    locked,
    models_folder,
    pause,
    unreadable,
)
from gc2ray.models.checkpoint.consistency import check_directory
from gc2ray.models.checkpoint.fetch_url import fetch_from_url, list_files
from gc2ray.models.checkpoint.tensors import MAX_HEADER_BYTES

METADATA_FILES = tuple(pattern for pattern in FETCHED if pattern != "*.safetensors")
"""Files of a model but its weights."""
DIGESTED = (
    "config.json", "generation_config.json", "*processor_config.json", "tokenizer*.json",
    "tokenizer.model", "vocab*.json", "vocab*.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "model.safetensors.index.json",
)  # fmt: skip
"""Small files that change answers; all of them are fetched."""
WHOLE_SIGNS = ("config.json", "tokenizer_config.json", "chat_template.*", "*.safetensors")
"""Files in a hub's cache if the model is complete; other programs fetch parts of one."""
COMMIT = re.compile("[0-9a-f]{40}")
REFUSALS = (401, 403, 404)
"""Status codes of the hub for a model that does not exist or is forbidden; others may pass."""
TAIL_BYTES = 64 * 1024


@dataclass(frozen=True)
class FetchedModel:
    """A model that can be loaded.

    Attributes:
        directory: The model's directory on this node.
        digest: Digest of its files; see `model_digest`.
    """

    directory: Path
    digest: str


def fetch_model(
    model: ModelConfig, *, tick: Tick = lambda: None, jitter_seconds: float = JITTER_SECONDS
) -> FetchedModel:
    """Fetch a model to this node's disk, unless it is there.

    Args:
        model: The recipe's model.
        tick: Called on progress, whether this process fetches or another.
        jitter_seconds: The first request to the storage waits a random part of this.

    Raises:
        ConfigError: There is no such model, it may not be read, or the cache not written.
        OSError: The network failed, or the disk is full.
    """
    model.check()
    if model.is_url or not (model.is_local or constants.is_offline_mode()):
        pause(jitter_seconds)
    directory = _fetched(model, FETCHED, tick)
    return FetchedModel(directory, model_digest(directory))


def fetch_metadata(model: ModelConfig) -> Path:
    """Fetch a model's config, tokenizer and processor to this node's disk, but no weights.

    Raises:
        ConfigError, OSError: As `fetch_model`.
    """
    model.check()
    return _fetched(model, METADATA_FILES, lambda: None)


def _fetched(model: ModelConfig, patterns: Sequence[str], tick: Tick) -> Path:
    if model.is_local:
        return Path(model.path).expanduser()
    if model.is_url:
        return fetch_from_url(model.path, patterns, tick)
    return _from_hub(model, patterns, tick)


def check_model(model: ModelConfig, taken_over: TakenOver = NOTHING) -> None:
    """Check a model as far as that is possible without the hub and the model's libraries.

    Of a directory all files are checked, of weights their headers. Of a URL the small files are
    fetched and checked. A hub id is checked if the hub's cache has it and the hub cannot have
    another version by now.

    Args:
        model: The recipe's model.
        taken_over: Settings of the recipe that replace those of the model's files.

    Raises:
        ConfigError: There is no such model, it may not be read, or not be used.
        OSError: The storage does not answer, or the disk is full.
    """
    model.check()
    if model.is_local:
        check_directory(Path(model.path).expanduser(), taken_over, name=model.path)
    elif model.is_url:
        _, files = list_files(model.path)
        if not any(file.name.endswith(".safetensors") for file in files):
            raise ConfigError(
                f"recipe.model.path: {model.path} has no weights in safetensors; others, such as "
                "pickles, are never loaded"
            )
        check_directory(fetch_metadata(model), taken_over, name=model.path, weights=False)
    elif (snapshot := _snapshot_here(model)) is not None:
        offline = constants.is_offline_mode()  # else what is missing may still be fetched
        check_directory(snapshot, taken_over, name=model.path, weights=offline)


def _snapshot_here(model: ModelConfig) -> Path | None:
    """A hub's model in the hub's cache, if it is complete and cannot have changed."""
    if not (constants.is_offline_mode() or COMMIT.fullmatch(model.revision or "")):
        return None
    cache = constants.HF_HUB_CACHE
    try:
        snapshot = Path(
            snapshot_download(
                model.path, revision=model.revision, cache_dir=cache, local_files_only=True
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return snapshot if all(any(snapshot.glob(sign)) for sign in WHOLE_SIGNS) else None


def model_digest(directory: Path) -> str:
    """SHA-256 over a model's small files, and of each weight file name, size, header, last 64 KiB.

    Copies of a model have the same digest. A tensor's name, shape or dtype changes it, and so does
    training, which changes the end of every file; and so does any byte of the configurations, the
    tokenizer, the processor or the chat template, because each may change answers. Notes, logs and
    other files do not. Not covered: weights that were changed in the middle of a file only.
    """
    small = {path for pattern in DIGESTED for path in directory.glob(pattern) if path.is_file()}
    described = [
        (str(path.relative_to(directory)), hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(small)
    ]
    weights = [_weights_digest(path) for path in sorted(directory.glob("*.safetensors"))]
    return hashlib.sha256(json.dumps([described, weights]).encode()).hexdigest()


def _weights_digest(path: Path) -> tuple[str, int, str, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
    return path.name, size, hashlib.sha256(header).hexdigest(), hashlib.sha256(tail).hexdigest()


def _from_hub(model: ModelConfig, patterns: Sequence[str], tick: Tick) -> Path:
    """Fetch a model into the hub's cache, unless it is there.

    Raises:
        ConfigError: The hub does not have it or forbids it; offline, the cache does not have it.
        OSError: The hub does not answer, or the disk is full.
    """
    try:
        directory = _snapshot(model, patterns, tick)
    except LocalEntryNotFoundError as error:
        if not constants.is_offline_mode():
            error.add_note(
                f"recipe.model.path: there is no directory {model.path}, and the hub does not "
                "answer: LocalEntryNotFoundError"
            )
            raise
        raise ConfigError(
            f"recipe.model.path: there is no directory {model.path}; as a model of the hub, at "
            f"{model.revision or 'main'}, it is not in {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE is set: unset it, or name a directory"
        ) from error
    except HFValidationError as error:
        raise unreadable(model.path, error) from error
    except HfHubHTTPError as error:
        if error.response.status_code not in REFUSALS:
            raise
        raise unreadable(model.path, error) from error
    if not (directory / "config.json").is_file():
        raise ConfigError(f"recipe.model.path: there is no model at {model.path} (no config.json)")
    return directory


def _snapshot(model: ModelConfig, patterns: Sequence[str], tick: Tick) -> Path:
    cache = Path(constants.HF_HUB_CACHE)
    what: dict[str, Any] = {
        "repo_id": model.path,
        "revision": model.revision,
        "cache_dir": cache,
        "allow_patterns": list(patterns),
        "ignore_patterns": list(LEFT_OUT),
    }
    name = repo_folder_name(repo_id=model.path, repo_type="model")
    with locked(models_folder() / f"{name}.lock", cache / name, tick):
        if not constants.is_offline_mode():
            check_disk_space(model.path, _hub_bytes(what), cache, "HF_HOME")
        return Path(snapshot_download(**what))


def _hub_bytes(what: Mapping[str, Any]) -> int:
    """Bytes still to be fetched; 0 if the hub does not answer, as the cache may be enough."""
    try:
        files = snapshot_download(dry_run=True, **what)
    except DryRunError:
        return 0
    return sum(file.file_size for file in files if file.will_download)

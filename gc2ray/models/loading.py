"""Load a checkpoint whole, or refuse it.

What its files do not have would be random numbers, others in every process. Whatever goes wrong is
one `ConfigError` with the reason, except for trouble of the machine, memory above all, which is not
the model's.

Security: `trust_remote_code` is off and weights are read from safetensors only, so loading a model
runs none of its code.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import cached_files

from gc2ray.core.config.generation import NOTHING, TakenOver
from gc2ray.core.errors import ConfigError
from gc2ray.models.base import LoadedModel, ModelMetadata
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.checkpoint.consistency import check, check_directory
from gc2ray.models.checkpoint.description import FILES, Checkpoint
from gc2ray.models.registry import FAMILIES

BUFFERS = frozenset({"position_ids", "inv_freq", "masked_bias", "original_inv_freq"})
"""Tensors of older files that are computed now."""
OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
NO_HOST_MEMORY = "can't allocate memory"
"""What torch says of it in a plain RuntimeError."""
NAMES_TOLD, REASON_CHARACTERS = 3, 300
log = logging.getLogger(__name__)


def load(
    path: str, *, revision: str | None, dtype: str, device: str, taken_over: TakenOver = NOTHING
) -> LoadedModel:
    """Load a checkpoint from a directory or the Hugging Face hub.

    Args:
        path: Directory, or hub id.
        revision: Commit or tag of a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, `cuda:1`, …
        taken_over: What the recipe decides in place of the model's files.

    Raises:
        ConfigError: There is no such model, it is of another architecture, its files contradict
            each other, or its weights are not whole.
    """
    with _loading(path):
        found, config, processor = _described(path, revision, taken_over, weights=True)
        model = _whole_model(found, path, revision, getattr(torch, dtype))
    model.to(device).eval()
    with _loading(path):
        family = FAMILIES[config.model_type](model, processor)
        family.freeze()
    return LoadedModel(model, processor, family, found.ends)


def load_metadata(path: str, *, dtype: str, taken_over: TakenOver = NOTHING) -> ModelMetadata:
    """What a checkpoint's directory says of the model, without its weights.

    Raises:
        ConfigError: As `load`, weights apart.
    """
    with _loading(path):
        _, config, processor = _described(path, None, taken_over, weights=False)
        itemsize = getattr(torch, dtype).itemsize
        return FAMILIES[config.model_type].outline(config, processor, itemsize)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn whatever is raised into an error that names the model, but for the machine's trouble."""
    try:
        yield
    except (ConfigError, *OF_THE_MACHINE):
        raise
    except Exception as error:
        if NO_HOST_MEMORY in str(error):
            raise
        raise ConfigError(
            f"recipe.model.path: {path} cannot be loaded: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """What an exception says, on one line: its first, and all that this announces by a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]
    kind = "" if isinstance(error, OSError | ImportError) else f"{type(error).__name__}: "
    return f"{kind}{said}"[:REASON_CHARACTERS]


def _described(
    path: str, revision: str | None, taken_over: TakenOver, *, weights: bool
) -> tuple[Checkpoint, Any, Any]:
    """What the files say, checked, with the config and the processor that are made of them."""
    is_here = Path(path).is_dir()
    directory = Path(path) if is_here else _in_hub_cache(path, revision)
    found = check_directory(directory, taken_over, weights=weights and is_here)
    where = {"revision": revision, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **where)
    # Pillow's image processor, also where torchvision is at hand: its resizing is another.
    processor = AutoProcessor.from_pretrained(path, backend="pil", **where)
    found = _filled(found, config, processor)
    check(found, taken_over)
    _check_prompts(found, processor)
    return found, config, processor


def _in_hub_cache(path: str, revision: str | None) -> Path:
    """Where the small files of a hub id lie once they were fetched."""
    files = cached_files(
        path, list(FILES), revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(path if not files else files[0]).parent


def _filled(found: Checkpoint, config: Any, processor: Any) -> Checkpoint:
    """What files leave out, as transformers has it."""
    tokenizer = processor.tokenizer
    token, end = processor.image_token, tokenizer.eos_token_id
    number = tokenizer.convert_tokens_to_ids(token)
    return replace(
        found,
        config=config.to_dict(),
        images={**found.images, **processor.image_processor.to_dict()},
        processor={"patch_size": processor.patch_size, "image_token": token},
        has_template=bool(processor.chat_template),
        tokens={} if number is None else {token: number},
        tokenizer_ends=() if end is None else (end,),
    )


def _check_prompts(found: Checkpoint, processor: Any) -> None:
    """Refuse a chat template or tokenizer that makes prompts which the model cannot read."""
    ids = ChatPrompt(processor).encode("What is it?")
    marks = ids.count(found.placeholder or 0)
    if marks != 1:
        raise ConfigError(
            f"recipe.model.path: {found.name}: its chat template makes {marks} image tokens "
            f"({found.image_token}, {found.placeholder}) of one image; use the template that it "
            "was published with"
        )
    rows = found.text["vocab_size"]
    if max(ids) >= rows:
        raise ConfigError(
            f"recipe.model.path: {found.name}: its prompts have token {max(ids)}, and the "
            f"text table has {rows} rows, from 0; use the tokenizer that it was published with"
        )


def _whole_model(found: Checkpoint, path: str, revision: str | None, dtype: torch.dtype) -> Any:
    """The model on the CPU, none of its weights made up.

    Raises:
        ConfigError: Its files lack some.
    """
    with without_load_report():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, with their names
        )
    model, info = loaded
    _check_whole(found, info, model)
    return model


def _check_whole(found: Checkpoint, info: Mapping[str, Any], model: Any) -> None:
    """Refuse a model of which transformers has made something up, or left something out.

    Raises:
        ConfigError: It has; the message names the first tensors.
    """
    total = len(model.state_dict())
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unexpected = [name for name in unexpected if name.rpartition(".")[2] not in BUFFERS]
    mismatched = sorted(
        f"{name} has {tuple(there)}, not {tuple(wanted)}"
        for name, there, wanted in info["mismatched_keys"]
    )
    where = f"recipe.model.path: {found.name}"
    if missing:
        hint = _tied_head(found, missing) or _other_names(unexpected)
        raise ConfigError(
            f"{where} lacks {len(missing)} of the model's {total} tensors, which would be random "
            f"numbers: {_few(missing)}{hint}"
        )
    if mismatched:
        raise ConfigError(
            f"{where} has {len(mismatched)} tensors of other sizes than config.json says: "
            f"{_few(mismatched)}"
        )
    if info["error_msgs"]:
        raise ConfigError(f"{where} cannot be loaded: {_few(info['error_msgs'])}")
    left_out = _left_out(model, unexpected)
    if left_out:
        raise ConfigError(
            f"{where} has {len(left_out)} tensors of parts that its config.json leaves out, layers "
            f"or biases: {_few(left_out)}; use the config.json that it was published with"
        )
    if unexpected:
        told = (found.name, len(unexpected), _few(unexpected))
        log.warning("%s has %d tensors that the model has no use for: %s", *told)


def _left_out(model: Any, unexpected: Collection[str]) -> list[str]:
    """Of tensors that nothing takes, those of a module that is there, or of one more layer."""
    modules = {name for name, _ in model.named_modules()}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return [
        name
        for name in unexpected
        if (name.rpartition(".")[0] in modules and name.rpartition(".")[2] in ("weight", "bias"))
        or any(
            part.isdecimal() and ".".join(name.split(".")[:at]) in lists
            for at, part in enumerate(name.split("."))
        )
    ]


def _few(names: Collection[str]) -> str:
    """The first of them."""
    first = list(names)[:NAMES_TOLD]
    return ", ".join([*first, "…"] if len(names) > len(first) else first)


def _other_names(unexpected: Collection[str]) -> str:
    """What may be the missing ones under other names."""
    return f"; it has others instead ({len(unexpected)}): {_few(unexpected)}" if unexpected else ""


def _tied_head(found: Checkpoint, missing: Collection[str]) -> str:
    """What to do where only the language model's own configuration says that it has no head."""
    if not found.text.get("tie_word_embeddings") or "lm_head.weight" not in missing:
        return ""
    return (
        "; config.json has tie_word_embeddings true in text_config only, where transformers 5 does "
        "not look: write it at the top level, too"
    )


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of missing tensors, which is told in a line of ours."""

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(keep)
    try:
        yield
    finally:
        theirs.removeFilter(keep)

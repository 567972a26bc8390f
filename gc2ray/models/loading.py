"""Load a checkpoint, or refuse one that is not complete.

Weights that the files lack would be random numbers, different in every process. Every problem of
the model is a `ConfigError` with the reason; problems of the machine, above all too little memory,
are raised as they are.

Security: `trust_remote_code` is off and weights are read from safetensors only, so loading a model
runs none of its code.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_files

from gc2ray.core.config.generation import NOTHING, TakenOver
from gc2ray.core.errors import ConfigError
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import ModelMetadata
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.checkpoint.consistency import check_checkpoint, check_directory
from gc2ray.models.checkpoint.description import FILES, Checkpoint
from gc2ray.models.processor import Processor, load_processor
from gc2ray.models.registry import adapter_of, metadata_of

BUFFERS = frozenset({"position_ids", "inv_freq", "masked_bias", "original_inv_freq"})
"""Tensors in older files that transformers now computes."""
OF_THE_MACHINE = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
NO_HOST_MEMORY = "can't allocate memory"
"""Part of the RuntimeError that torch raises when the host has no memory left."""
NAMES_LISTED, REASON_CHARACTERS = 3, 300
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
        taken_over: Settings of the recipe that replace those of the model's files.

    Raises:
        ConfigError: There is no such model, its architecture is not supported, its files contradict
            each other, or weights are missing.
    """
    with _loading(path):
        checkpoint, config, processor = _described(path, revision, taken_over, weights=True)
        model = _whole_model(checkpoint, path, config, revision, getattr(torch, dtype))
    model.to(device).eval()
    with _loading(path):
        adapter = adapter_of(model, processor, taken_over.score)
        adapter.freeze()
    return LoadedModel(model, processor, adapter, checkpoint.ends)


def free_device_memory() -> None:
    """Give the memory of models that are not used any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_metadata(path: str, *, dtype: str, taken_over: TakenOver = NOTHING) -> ModelMetadata:
    """Load the metadata of the model in a directory, without its weights.

    Raises:
        ConfigError: As `load`, weights apart.
    """
    with _loading(path):
        _, config, processor = _described(path, None, taken_over, weights=False)
        itemsize = getattr(torch, dtype).itemsize
        return metadata_of(config, processor, itemsize, taken_over.score)


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """Turn errors into one that names the model, except problems of the machine."""
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
    """An exception's message on one line: the first line, or all lines if that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    message = " ".join(lines) if lines[0].endswith(":") else lines[0]
    kind = "" if isinstance(error, OSError | ImportError) else f"{type(error).__name__}: "
    return f"{kind}{message}"[:REASON_CHARACTERS]


def load_config(path: str, revision: str | None) -> Any:
    """A model's config, which ties the head to the text table where transformers 4 did.

    Version 4 asked the language model's own config. Version 5 asks the outermost one, in which
    files of before have nothing, or a value that was not used. Attention is torch's: some files
    name that of another package, which made their training faster.

    Args:
        path: Directory, or hub id.
        revision: Commit or tag of a hub id.
    """
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    config._attn_implementation = "sdpa"
    written, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    tied_inside = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    if tied_inside or "tie_word_embeddings" not in written:
        config.tie_word_embeddings = tied_inside
    return config


def _described(
    path: str, revision: str | None, taken_over: TakenOver, *, weights: bool
) -> tuple[Checkpoint, Any, Processor]:
    """The settings in the files, checked, with the config and the processor made from them."""
    is_here = Path(path).is_dir()
    directory = Path(path) if is_here else _in_hub_cache(path, revision)
    checkpoint = check_directory(directory, taken_over, weights=weights and is_here)
    config = load_config(path, revision)
    processor = load_processor(path, revision)
    checkpoint = _filled(checkpoint, config, processor)
    try:
        check_checkpoint(checkpoint, taken_over)
    except ConfigError as error:  # not from the files alone, which were checked above
        raise ConfigError(f"{error}; what a file leaves out is transformers' default") from None
    _check_prompts(checkpoint, processor)
    return checkpoint, config, processor


def _in_hub_cache(path: str, revision: str | None) -> Path:
    """The directory of a hub id's small files, which are fetched if need be."""
    files = cached_files(
        path, list(FILES), revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return Path(path if not files else files[0]).parent


def _filled(checkpoint: Checkpoint, config: Any, processor: Processor) -> Checkpoint:
    """The checkpoint with transformers' values for settings that the files leave out."""
    token, end = processor.image_token, processor.tokenizer.eos_token_id
    return replace(
        checkpoint,
        config=config.to_dict(),
        images={**checkpoint.images, **processor.image_processor.to_dict()},
        processor={**processor.settings, "image_token": token},
        has_template=bool(processor.chat_template),
        tokens={token: processor.image_token_id},
        tokenizer_ends=() if end is None else (end,),
    )


def _check_prompts(checkpoint: Checkpoint, processor: Processor) -> None:
    """Refuse a chat template or tokenizer whose prompts the model cannot read."""
    ids = ChatPrompt(processor).encode("What is it?")
    marks = ids.count(processor.image_token_id)
    if marks != 1:
        raise ConfigError(
            f"recipe.model.path: {checkpoint.name}: its chat template makes {marks} image tokens "
            f"({processor.image_token}, {processor.image_token_id}) of one image; use the template "
            "that it was published with"
        )
    rows = checkpoint.text["vocab_size"]
    if max(ids) >= rows:
        raise ConfigError(
            f"recipe.model.path: {checkpoint.name}: its prompts have token {max(ids)}, and the "
            f"text table has {rows} rows, from 0; use the tokenizer that it was published with"
        )


def _whole_model(
    checkpoint: Checkpoint, path: str, config: Any, revision: str | None, dtype: torch.dtype
) -> Any:
    """The model on the CPU, with all weights read from its files.

    Raises:
        ConfigError: The files lack weights.
    """
    with without_load_report():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
        )
    model, info = loaded
    _check_whole(checkpoint, info, model)
    # Not tied, whatever the config says, where the files have a head of its own.
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is table.weight
    return model


def _check_whole(checkpoint: Checkpoint, info: Mapping[str, Any], model: Any) -> None:
    """Refuse a model with weights that transformers made up or left out.

    Raises:
        ConfigError: There are some; the message names the first tensors.
    """
    total = len(model.state_dict())
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    unexpected = [name for name in unexpected if name.rpartition(".")[2] not in BUFFERS]
    mismatched = sorted(
        f"{name} has {tuple(there)}, not {tuple(wanted)}"
        for name, there, wanted in info["mismatched_keys"]
    )
    where = f"recipe.model.path: {checkpoint.name}"
    if missing:
        hint = _other_names(unexpected) or _lost_head(missing)
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
        unused = (checkpoint.name, len(unexpected), _few(unexpected))
        log.warning("%s has %d tensors that the model does not use: %s", *unused)


def _left_out(model: Any, unexpected: Collection[str]) -> list[str]:
    """The unexpected tensors that belong to an existing module, or to one more layer."""
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
    """The first names of several."""
    first = list(names)[:NAMES_LISTED]
    return ", ".join([*first, "…"] if len(names) > len(first) else first)


def _other_names(unexpected: Collection[str]) -> str:
    """A hint that missing tensors may be there under other names."""
    return f"; it has others instead ({len(unexpected)}): {_few(unexpected)}" if unexpected else ""


def _lost_head(missing: Collection[str]) -> str:
    """A hint where the head alone is missing."""
    if [*missing] != ["lm_head.weight"]:
        return ""
    return "; copy the model again (a head that is the text table: set tie_word_embeddings true)"


@contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of missing tensors and its progress bar of weights.

    gc2ray reports missing tensors itself, in one line.
    """

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(keep)
    had_bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        theirs.removeFilter(keep)
        if had_bar:
            hf_logging.enable_progress_bar()

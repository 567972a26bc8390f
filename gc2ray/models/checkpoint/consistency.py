"""Checks whether the files of a checkpoint agree, before a model is loaded from them.

A checkpoint says many things twice: the image token stands in `config.json` and in the tokenizer,
the cutting of images in `config.json` and in the processor. Where the two differ, answers would be
wrong without any error; such a checkpoint is refused, with both values. Refused as well are
settings that gc2ray does not follow (quantised weights, rules of `generation_config.json`, steps of
image processing), and a model without a token that ends an answer.

What the architectures differ in is in `gc2ray.models.checkpoint.family_rules`.

The checks run twice. `check_directory` runs them on the files as they are written, which needs none
of the model's libraries, so that a driver can check before it starts anything; values that a file
leaves out are not compared. `gc2ray.models.loading` runs them again with all defaults filled in.

Not covered: which tensors a model needs; whether a chat template is the right one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from gc2ray.core.config.compression import Score, check_suits
from gc2ray.core.config.generation import NOTHING, TakenOver
from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.description import (
    ADAPTER,
    IMAGE_TOKEN_KEYS,
    Checkpoint,
    as_json,
    mapping,
    number,
    read_checkpoint,
)
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES, FamilyRules
from gc2ray.models.checkpoint.tensors import (
    check_named_once,
    check_unquantised,
    table_rows,
    tensor_headers,
)
from gc2ray.models.checkpoint.unsupported import REMOTE, said, why_unsupported
from gc2ray.models.shape import CLASS_TOKEN_TOWERS

MODEL_TYPES = ("llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm")
"""The keys of `gc2ray.models.registry.FAMILIES`; each has its `FAMILY_RULES`."""
COLOURS = 3
FILTERS = range(6)
"""Numbers of those of Pillow's resampling filters that transformers names."""
QUANTISATION = ("quantization_config", "compression_config")
LAYERED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
OWN_CODE = (
    "%s: its config.json names code of its own (auto_map), which is never run: the model is loaded "
    "as transformers has it"
)
SLOW_TOKENIZER = (
    "%s is a sentencepiece model without a tokenizer.json: transformers 5 splits some texts "
    "differently than version 4 did, and answers may be worse; make a tokenizer.json with version "
    "4: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
)

log = logging.getLogger(__name__)


def check_directory(
    directory: Path,
    taken_over: TakenOver = NOTHING,
    *,
    name: str | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Check a checkpoint without loading any of the model's libraries.

    Args:
        directory: The checkpoint's directory.
        taken_over: Settings of the recipe that replace the model's own.
        name: How messages name the checkpoint; None: by its directory.
        weights: Whether the weights are in the directory, too.

    Returns:
        The settings in its files.

    Raises:
        ConfigError: The checkpoint cannot be used; the message says why.
    """
    checkpoint = read_checkpoint(directory, name or str(directory))
    check_checkpoint(checkpoint, taken_over)
    if weights:
        headers = tensor_headers(directory)
        check_unquantised(directory, headers)
        check_named_once(directory, headers)
        checkpoint = replace(checkpoint, table_rows=table_rows(headers))
        check_checkpoint(checkpoint, taken_over)
        _check_tokenizer(directory)
    if checkpoint.config.get("auto_map"):
        log.warning(OWN_CODE, checkpoint.name)
    slow, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if slow.is_file() and not fast.is_file():
        log.warning(SLOW_TOKENIZER, slow)
    return checkpoint


def _check_tokenizer(directory: Path) -> None:
    """Refuse a model without one; of some types transformers makes an empty tokenizer then."""
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ConfigError(
            f"recipe.model.path: {directory} has no tokenizer: no {TOKENIZERS[0]}; copy the model "
            "again"
        )


def check_checkpoint(checkpoint: Checkpoint, taken_over: TakenOver = NOTHING) -> None:
    """Refuse a checkpoint that contradicts itself, or needs something that is not supported.

    Raises:
        ConfigError: The first problem.
    """
    for problem in _problems(checkpoint, taken_over):
        raise ConfigError(f"recipe.model.path: {checkpoint.name}: {problem}")
    _check_score(checkpoint, taken_over.score)
    if taken_over.method is not None:
        check_suits(taken_over.method, str(checkpoint.config.get("model_type")))


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


# --- Each of these functions yields the problems of one kind. ------------------------------------


def _problems(checkpoint: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    """All problems; one that explains others comes first."""
    yield from _architecture(checkpoint)
    rules = FAMILY_RULES[checkpoint.config["model_type"]]
    yield from chain(
        _adapter(checkpoint),
        _quantisation(checkpoint),
        _tower(checkpoint, rules),
        _layers(checkpoint),
        _image_token(checkpoint),
        _processor_type(checkpoint, rules),
        _geometry(checkpoint, rules),
        *(check(checkpoint) for check in rules.checks),
        _colours(checkpoint),
        _resampling(checkpoint),
        _steps(checkpoint, rules),
        _template(checkpoint),
        _table(checkpoint, taken_over),
        _ends(checkpoint, taken_over),
        _unfollowed(checkpoint, taken_over),
    )


def _architecture(checkpoint: Checkpoint) -> Iterator[str]:
    kind = checkpoint.config.get("model_type")
    if kind not in MODEL_TYPES or why_unsupported(checkpoint.config):
        code = f", {REMOTE}" if checkpoint.config.get("auto_map") else ""
        reason = why_unsupported(checkpoint.config) or f"{said(kind)}{code}"
        yield f"{reason}; supported: {', '.join(MODEL_TYPES)}"


def _adapter(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.has_adapter:
        yield (
            f"it has an adapter ({ADAPTER}), which is loaded where peft is installed and left out "
            "where it is not; merge it into the weights, and remove that file"
        )


def _quantisation(checkpoint: Checkpoint) -> Iterator[str]:
    for location, part in (
        ("", checkpoint.config),
        ("text_config.", checkpoint.text),
        ("vision_config.", checkpoint.vision),
    ):
        for key in QUANTISATION:
            if part.get(key):
                method = mapping(part[key]).get("quant_method", "of no named method")
                yield (
                    f"config.json has {location}{key} ({method}); quantised checkpoints are not "
                    "supported: name the original"
                )


def _tower(checkpoint: Checkpoint, rules: FamilyRules) -> Iterator[str]:
    kind = checkpoint.vision.get("model_type")
    if kind is not None and kind not in rules.towers:
        yield f"the vision tower is {kind}, and should be {' or '.join(rules.towers)}"
    strategy = checkpoint.config.get("vision_feature_select_strategy")
    wanted = rules.towers.get(str(kind))
    if None not in (strategy, wanted) and strategy != wanted:
        yield (
            f"vision_feature_select_strategy is {strategy!r}, and a tower of type {kind} needs "
            f"{wanted!r}: the other keeps a class token, or drops a patch"
        )
    layers, named = (
        number(checkpoint.vision.get("num_hidden_layers")),
        checkpoint.config.get("vision_feature_layer"),
    )
    for layer in named if isinstance(named, list) else [named]:
        if layers is not None and isinstance(layer, int) and not -layers - 1 <= layer <= layers:
            yield (
                f"config.json takes features from layer {layer} (vision_feature_layer), and the "
                f"vision tower has {layers} (vision_config.num_hidden_layers)"
            )


def _image_token(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    named = {key: config[key] for key in IMAGE_TOKEN_KEYS if config.get(key) is not None}
    if len({*map(str, named.values())}) > 1:
        yield f"config.json names two image tokens: {as_json(named)}; leave the wrong one out"
    own, theirs = checkpoint.config_image_token, checkpoint.tokens.get(checkpoint.image_token)
    if own is not None and theirs is not None and own != theirs:
        yield (
            f"the image token is {own} in config.json "
            f"({next(iter(named), IMAGE_TOKEN_KEYS[0])}), and {theirs} in the tokenizer "
            f"({checkpoint.image_token}): correct the wrong one"
        )


def _layers(checkpoint: Checkpoint) -> Iterator[str]:
    for location, part in (("text_config", checkpoint.text), ("vision_config", checkpoint.vision)):
        for name in LAYERED:
            value = part.get(name)
            if value is not None and (number(value) or 0) <= 0:
                yield f"{location}.{name} in config.json is {as_json(value)}, and should be above 0"


def _processor_type(checkpoint: Checkpoint, rules: FamilyRules) -> Iterator[str]:
    if not checkpoint.images:
        yield (
            "nothing says how its images are cut: no preprocessor_config.json, and no "
            "image_processor in processor_config.json; copy the model again"
        )
    kind = checkpoint.images.get("image_processor_type")
    if kind is not None and not rules.cuts_like(kind):
        yield (
            f"the image processor is {as_json(kind)} (image_processor_type), and images are cut as "
            f"{rules.image_processors[0]} does; use the processor that it was published with"
        )


def _geometry(checkpoint: Checkpoint, rules: FamilyRules) -> Iterator[str]:
    written = {name: checkpoint.vision.get(name) for name in ("image_size", "patch_size")}
    for name, value in written.items():
        if value is not None and (rules.side(value) or 0) <= 0:
            yield f"vision_config.{name} in config.json is {as_json(value)}, and should be pixels"
    side, patch = map(rules.side, written.values())
    for name, edge in rules.view_sides(checkpoint.images):
        if side is not None and edge != side:
            yield (
                f"the image processor cuts views of {edge} pixels ({name}), the vision tower "
                f"takes {side} (vision_config.image_size): correct the wrong one"
            )
    theirs = checkpoint.processor.get("patch_size")
    if None not in (side, theirs, patch) and theirs != patch:
        yield (
            f"patch_size is {as_json(theirs)} in the processor, and {patch} in config.json "
            "(vision_config.patch_size): correct the wrong one"
        )


def _colours(checkpoint: Checkpoint) -> Iterator[str]:
    for name in ("image_mean", "image_std"):
        values = checkpoint.images.get(name)
        if values is None:
            continue
        numbers = [value for value in _list(values) if isinstance(value, int | float)]
        finite = all(map(math.isfinite, numbers)) and len(numbers) == len(_list(values)) == COLOURS
        if not finite or (name == "image_std" and 0 in numbers):
            yield (
                f"{name} of the image processor is {as_json(values)}, and should be {COLOURS} "
                "numbers, one for each colour"
            )
    factor = checkpoint.images.get("rescale_factor", 1)
    if isinstance(factor, bool) or not (isinstance(factor, int | float) and 0 < factor < math.inf):
        yield (
            f"rescale_factor of the image processor is {as_json(factor)}, and should be a number "
            "above 0, as 1/255"
        )


def _resampling(checkpoint: Checkpoint) -> Iterator[str]:
    value = checkpoint.images.get("resample", FILTERS[0])
    if number(value) not in FILTERS:
        yield (
            f"resample of the image processor is {as_json(value)}, and should be the number of one "
            f"of Pillow's filters, {FILTERS[0]} to {FILTERS[-1]}"
        )


def _steps(checkpoint: Checkpoint, rules: FamilyRules) -> Iterator[str]:
    for name, value in checkpoint.images.items():
        if name in rules.done_steps and value is not None and not value:
            yield f"the image processor has {name} {as_json(value)}, and it is always done here"
        elif name.startswith("do_") and name not in rules.done_steps | rules.idle_steps and value:
            yield f"the image processor has {name} {as_json(value)}, which is not done here"


def _template(checkpoint: Checkpoint) -> Iterator[str]:
    if not checkpoint.has_template:
        yield (
            "the model has no chat template; add chat_template.jinja to it (a model of the hub or "
            "behind a URL: copy it into a directory, add it there, and name the directory)"
        )


def _table(checkpoint: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    rows = number(checkpoint.text.get("vocab_size"))
    if rows is None:
        return
    if checkpoint.table_rows not in (None, rows):
        yield (
            f"the text table has {checkpoint.table_rows} rows in the weights, and {rows} in "
            "config.json (text_config.vocab_size): correct it, or copy the model again"
        )
    named = [(f"the image token ({checkpoint.image_token})", checkpoint.config_image_token)]
    named += [("the end of an answer (eos_token_id)", token) for token in checkpoint.ends]
    named += [("recipe.generation.stop_token_ids", token) for token in taken_over.stop_token_ids]
    for what, token in named:
        if token is not None and not 0 <= token < rows:
            yield f"{what} is token {token}, and the text table has {rows} rows, from 0"


def _ends(checkpoint: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    unknown = checkpoint.tokenizer_ends is None
    if not (checkpoint.ends or unknown or taken_over.stop_token_ids):
        yield (
            "no token is named that ends an answer: none in generation_config.json, config.json or "
            "the tokenizer; add eos_token_id to generation_config.json, or set "
            "recipe.generation.stop_token_ids"
        )


def _unfollowed(checkpoint: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    rules = {
        name: value for name, value in checkpoint.rules.items() if name not in taken_over.rules
    }
    if not rules:
        return
    listed = ", ".join(f"{name} {as_json(value)}" for name, value in rules.items())
    hint = "name it" if len(rules) == 1 else "name them"
    if "repetition_penalty" in rules:
        hint = f"set recipe.generation.repetition_penalty to follow that one, or {hint}"
    yield (
        f"generation_config.json has rules that answers would not follow: {listed}; {hint} in "
        "recipe.generation.ignore_model_rules"
    )


def _check_score(checkpoint: Checkpoint, score: Score | None) -> None:
    """Refuse scores by a class token of towers without one.

    Raises:
        ConfigError: The tower has none.
    """
    kind = checkpoint.vision.get("model_type")
    if score == "class_token" and kind not in (None, *CLASS_TOKEN_TOWERS):
        raise ConfigError(
            f"recipe.compression.score: the vision tower of {checkpoint.name} ({kind}) has no "
            "class token; leave the setting out, or choose another score"
        )

"""What the small files of a checkpoint say, and whether they say the same.

A checkpoint says many things twice: which token stands for an image in its configuration and in its
tokenizer, how images are cut in its configuration and in its processor. Where they differ answers
are wrong without a word, so it is refused, with both values. So is what answers would not follow:
quantised weights, rules of `generation_config.json`, steps of image processing; and a model that
names no token to end an answer with.

The same checks look twice. `read` takes the files as they are written, without the model's
libraries, so that a driver can look before it starts anything; what a file leaves out is not
compared, because the defaults are those libraries'. `gc2ray.families` looks again, with
everything filled in.

Not covered: which tensors a model needs; whether a chat template is the right one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gc2ray.core.config.generation import NOTHING, TakenOver, asked_for
from gc2ray.core.errors import ConfigError, first_line
from gc2ray.models.checkpoint.tensors import (
    check_named_once,
    check_unquantised,
    table_rows,
    tensor_headers,
)
from gc2ray.models.shape import CLASS_TOKEN_TOWERS

MODEL_TYPES = ("llava_next",)
"""Those of `gc2ray.families.FAMILIES`."""
CONVERTED = "https://huggingface.co/llava-hf"

DONE_STEPS = frozenset({"do_resize", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb"})
"""Steps of image processing that are always done."""
COLOURS = 3
IDLE_STEPS = frozenset({"do_center_crop"})
"""Steps that change nothing: a view has the size that it would be cropped to."""
PLACEHOLDER = ("image_token_index", "image_token_id")
ADDED_TOKENS = '"added_tokens":'
ADAPTER = "adapter_config.json"
FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "tokenizer.model", "chat_template.json", "chat_template.jinja", ADAPTER,
)  # fmt: skip
"""What is looked into here."""
BARE_TOKENIZERS = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Tokenizers without an end token unless their files name one."""
QUANTISATION = ("quantization_config", "compression_config")
LAYERED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
IMAGE_PROCESSOR = "LlavaNextImageProcessor"
"""What the types of image processors begin with whose views are ours: there are several of it."""
SLOW_TOKENIZER = (
    "%s is a sentencepiece model without a tokenizer.json: transformers 5 splits some texts in "
    "another way than version 4 did, and answers may be worse; make a tokenizer.json with version "
    "4: AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
)
SHOWN = 120
"""Characters of a value in a message."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself.

    Attributes:
        name: What messages call it.
        config: `config.json`.
        images: Settings of its image processor.
        processor: Other settings of its processor.
        has_template: Whether it says how a chat with an image is written.
        has_adapter: Whether an adapter lies with it.
        tokens: Ids of tokens that prompts and answers turn on, as the tokenizer has them.
        written_ends: Ids that its configurations name as the end of an answer.
        tokenizer_ends: Id of the tokenizer's end token, if it has one; None: not known.
        rules: What its generation config asks for, beyond what changes nothing.
        table_rows: Rows of the text table in the weights; None: not known.
    """

    name: str
    config: Mapping[str, Any]
    images: Mapping[str, Any]
    processor: Mapping[str, Any]
    has_template: bool
    has_adapter: bool
    tokens: Mapping[str, int]
    written_ends: tuple[int, ...]
    tokenizer_ends: tuple[int, ...] | None
    rules: Mapping[str, object]
    table_rows: int | None = None

    @property
    def text(self) -> Mapping[str, Any]:
        """Of its configuration, what is the language model's."""
        return _mapping(self.config.get("text_config"))

    @property
    def vision(self) -> Mapping[str, Any]:
        """Of its configuration, what is the vision tower's."""
        return _mapping(self.config.get("vision_config"))

    @property
    def image_token(self) -> str:
        """What stands for an image in a prompt."""
        return str(self.processor.get("image_token") or "<image>")

    @property
    def placeholder(self) -> int | None:
        """The id of that, as the configuration has it; None: left out."""
        named = (_number(self.config.get(key)) for key in PLACEHOLDER)
        return next((token for token in named if token is not None), None)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.written_ends or self.tokenizer_ends or ()


def check_directory(
    directory: Path,
    taken_over: TakenOver = NOTHING,
    *,
    name: str | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Look at a checkpoint in a directory as far as that needs none of the model's libraries.

    Args:
        directory: Where it lies.
        taken_over: What the recipe decides.
        name: What messages call it; None: the directory.
        weights: Whether its weights are there, too.

    Returns:
        What its files say.

    Raises:
        ConfigError: It cannot be used; the message says why.
    """
    found = read(directory, name or str(directory))
    check(found, taken_over)
    if weights:
        headers = tensor_headers(directory)
        check_unquantised(directory, headers)
        check_named_once(directory, headers)
        found = replace(found, table_rows=table_rows(headers))
        check(found, taken_over)
    slow, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if slow.is_file() and not fast.is_file():
        log.warning(SLOW_TOKENIZER, slow)
    return found


def check(found: Checkpoint, taken_over: TakenOver = NOTHING) -> None:
    """Refuse a checkpoint that contradicts itself, or asks for what is not done.

    Raises:
        ConfigError: With the first thing that is wrong.
    """
    for problem in _problems(found, taken_over):
        raise ConfigError(f"recipe.model.path: {found.name}: {problem}")


def read(directory: Path, name: str) -> Checkpoint:
    """What a checkpoint's files say, weights apart, as they are written.

    Args:
        directory: Where it lies.
        name: What messages call it.

    Raises:
        ConfigError: A file cannot be read, or is not what its name says.
    """
    if not (directory / "config.json").is_file():
        raise ConfigError(f"recipe.model.path: there is no model in {directory} (no config.json)")
    config, generation, tokenizer, processor = (
        _json(directory / name)
        for name in (
            "config.json", "generation_config.json", "tokenizer_config.json",
            "processor_config.json",
        )
    )  # fmt: skip
    images = processor.get("image_processor") or _json(directory / "preprocessor_config.json")
    text, tokens = _mapping(config.get("text_config")), _added_tokens(directory, tokenizer)
    image_token = _image_token(tokenizer) or processor.get("image_token")
    return Checkpoint(
        name=name,
        config=config,
        images=_mapping(images),
        processor={**processor, "image_token": image_token},
        has_template=bool(processor.get("chat_template") or _templates(directory)),
        has_adapter=(directory / ADAPTER).is_file(),
        tokens=tokens,
        written_ends=next(filter(None, map(_written_ends, (generation, text, config))), ()),
        tokenizer_ends=_tokenizer_ends(directory, tokenizer, tokens),
        # Of old, what is now in a file of its own stood in the configuration.
        rules=asked_for([generation] if generation else [text, config]),
    )


def _json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint; empty where there is none.

    Raises:
        ConfigError: It is there, and no object of JSON can be read from it.
    """
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"recipe.model.path: {path} cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"recipe.model.path: {path} should hold an object, {{…}}, and holds {shown(data)}"
        )
    return data


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _number(value: object) -> int | None:
    """An integer; None for anything else, which is left to the model's libraries to judge."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _content(token: object) -> str | None:
    """A token's text, which files write plainly or as an object."""
    token = _mapping(token).get("content", token)
    return token if isinstance(token, str) else None


def shown(value: object) -> str:
    """A value in a message, as JSON has it, cut where it is long."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _templates(directory: Path) -> bool:
    own = ("chat_template.jinja", "chat_template.json")
    more = directory / "additional_chat_templates"
    return any((directory / name).is_file() for name in own) or any(more.glob("*.jinja"))


def _image_token(tokenizer: Mapping[str, Any]) -> str | None:
    """As the tokenizer names it, which counts for more than the processor."""
    extra = _mapping(tokenizer.get("extra_special_tokens"))
    return _content(tokenizer.get("image_token")) or _content(extra.get("image_token"))


def _added_tokens(directory: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids of added tokens, special ones among them, that the files agree on."""
    claims = [
        *_json(directory / "added_tokens.json").items(),
        *((_content(told), key) for key, told in _decoder(tokenizer).items()),
        *_tokenizer_json(directory / "tokenizer.json"),
    ]
    ids: dict[str, set[int]] = {}
    for token, number in claims:
        if isinstance(token, str) and isinstance(number, int | str) and str(number).isdecimal():
            ids.setdefault(token, set()).add(int(number))
    return {token: min(found) for token, found in ids.items() if len(found) == 1}


def _decoder(tokenizer: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(tokenizer.get("added_tokens_decoder"))


def _tokenizer_json(path: Path) -> Iterator[tuple[str | None, object]]:
    """The added tokens of a `tokenizer.json`; the rest, megabytes of vocabulary, is not parsed."""
    try:
        text = path.read_bytes().decode()  # not read_text: it looks at every newline
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"recipe.model.path: {path} cannot be read: {first_line(error)}"
        ) from error
    start = text.find(ADDED_TOKENS)  # in a string its quotes would have backslashes
    if start < 0:
        return
    try:
        found, _ = json.JSONDecoder().raw_decode(text, text.index("[", start))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"recipe.model.path: {path} cannot be read: {first_line(error)}"
        ) from error
    yield from ((_content(token), _mapping(token).get("id")) for token in found)


def _written_ends(place: Mapping[str, Any]) -> tuple[int, ...]:
    named = place.get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    ends = tuple(token for token in map(_number, listed) if token is not None)
    if len(ends) != len(listed):
        raise ConfigError(
            f"recipe.model.path: eos_token_id is {shown(named)}, and should be a token id, or a "
            "list of them"
        )
    return ends


def _tokenizer_ends(
    directory: Path, tokenizer: Mapping[str, Any], tokens: Mapping[str, int]
) -> tuple[int, ...] | None:
    special = _json(directory / "special_tokens_map.json")
    token = _content(tokenizer.get("eos_token")) or _content(special.get("eos_token"))
    if token is not None:
        return (tokens[token],) if token in tokens else None
    has_none = "eos_token" in tokenizer or tokenizer.get("tokenizer_class") in BARE_TOKENIZERS
    return () if has_none else None


# --- what may be wrong: each of these tells its problems, none if all is well --------------------


def _problems(found: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    """All of them; what explains others comes first."""
    for of_the_model in (
        _architecture, _adapter, _quantisation, _tower, _layers, _placeholder, _processor_type,
        _geometry, _pinpoints, _colours, _steps, _template,
    ):  # fmt: skip
        yield from of_the_model(found)
    for of_its_answers in (_table, _ends, _unfollowed):
        yield from of_its_answers(found, taken_over)


def _architecture(found: Checkpoint) -> Iterator[str]:
    kind, names = found.config.get("model_type"), found.config.get("architectures") or ()
    if any(key.startswith("mm_") for key in found.config) or any(
        str(name).startswith("Llava") and str(name).endswith("ForCausalLM") for name in names
    ):
        yield (
            f"it is in the layout of LLaVA's authors (model_type {shown(kind)}), which "
            f"transformers does not load; name its conversion, of those at {CONVERTED}"
        )
    elif kind not in MODEL_TYPES:
        yield f"it is a {kind} model; supported: {', '.join(MODEL_TYPES)}"


def _adapter(found: Checkpoint) -> Iterator[str]:
    if found.has_adapter:
        yield (
            f"it has an adapter ({ADAPTER}), which is loaded where peft is installed and left out "
            "where it is not; merge it into the weights, and remove that file"
        )


def _quantisation(found: Checkpoint) -> Iterator[str]:
    for place, part in (
        ("", found.config),
        ("text_config.", found.text),
        ("vision_config.", found.vision),
    ):
        for key in QUANTISATION:
            if part.get(key):
                method = _mapping(part[key]).get("quant_method", "of no named method")
                yield (
                    f"config.json has {place}{key} ({method}); quantised checkpoints are not "
                    "supported: name the original"
                )


def _tower(found: Checkpoint) -> Iterator[str]:
    kind = found.vision.get("model_type")
    if kind is not None and kind not in CLASS_TOKEN_TOWERS:
        yield (
            f"the vision tower is {kind}, which has no class token to take scores from; only CLIP "
            "towers are supported"
        )
    strategy = found.config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        yield f"vision_feature_select_strategy is {strategy!r}; only 'default' is supported"
    layers, named = (
        _number(found.vision.get("num_hidden_layers")),
        found.config.get("vision_feature_layer"),
    )
    for layer in named if isinstance(named, list) else [named]:
        if layers is not None and isinstance(layer, int) and not -layers - 1 <= layer <= layers:
            yield (
                f"config.json takes features from layer {layer} (vision_feature_layer), and the "
                f"vision tower has {layers} (vision_config.num_hidden_layers)"
            )


def _placeholder(found: Checkpoint) -> Iterator[str]:
    named = {key: found.config[key] for key in PLACEHOLDER if found.config.get(key) is not None}
    if len({*map(str, named.values())}) > 1:
        yield f"config.json names two image tokens: {shown(named)}; leave the wrong one out"
    own, theirs = found.placeholder, found.tokens.get(found.image_token)
    if own is not None and theirs is not None and own != theirs:
        yield (
            f"the image token is {own} in config.json ({next(iter(named), PLACEHOLDER[0])}), and "
            f"{theirs} in the tokenizer ({found.image_token}): correct the wrong one"
        )


def _layers(found: Checkpoint) -> Iterator[str]:
    for place, part in (("text_config", found.text), ("vision_config", found.vision)):
        for name in LAYERED:
            value = part.get(name)
            if value is not None and (_number(value) or 0) <= 0:
                yield f"{place}.{name} in config.json is {shown(value)}, and should be above 0"


def _processor_type(found: Checkpoint) -> Iterator[str]:
    kind = found.images.get("image_processor_type")
    if kind is not None and not str(kind).startswith(IMAGE_PROCESSOR):
        yield (
            f"the image processor is {shown(kind)} (image_processor_type), and images are cut as "
            f"{IMAGE_PROCESSOR} does; use the processor that it was published with"
        )


def _geometry(found: Checkpoint) -> Iterator[str]:
    side, patch = found.vision.get("image_size"), found.vision.get("patch_size")
    for name, value in (("image_size", side), ("patch_size", patch)):
        if value is not None and (_number(value) or 0) <= 0:
            yield f"vision_config.{name} in config.json is {shown(value)}, and should be pixels"
    if side is None:
        return
    for name in ("size", "crop_size"):
        for edge in _edges(found.images.get(name)):
            if edge != side:
                yield (
                    f"the image processor cuts views of {edge} pixels ({name}), the vision tower "
                    f"takes {side} (vision_config.image_size): correct the wrong one"
                )
    theirs = found.processor.get("patch_size")
    if None not in (theirs, patch) and theirs != patch:
        yield (
            f"patch_size is {shown(theirs)} in the processor, and {patch} in config.json "
            "(vision_config.patch_size): correct the wrong one"
        )


def _edges(size: object) -> list[object]:
    """The sides in pixels that an image processor's size names."""
    if not isinstance(size, dict):
        return [] if size is None else [size]
    return [
        size[name] for name in ("shortest_edge", "height", "width") if size.get(name) is not None
    ]


def _pinpoints(found: Checkpoint) -> Iterator[str]:
    grids = []
    for place, part in (("config.json", found.config), ("the image processor", found.images)):
        written = part.get("image_grid_pinpoints")
        if written is None:
            continue
        try:
            grids.append({(int(height), int(width)) for height, width in written})
        except (TypeError, ValueError):
            grids.append({(0, 0)})
        if not grids[-1] or min(map(min, grids[-1])) <= 0:
            yield (
                f"image_grid_pinpoints of {place} is {shown(written)}, and should be a list of "
                "[height, width] in pixels"
            )
    if len(grids) == 2 and grids[0] != grids[1]:
        yield (
            f"image_grid_pinpoints are {shown(sorted(grids[0]))} in config.json, and "
            f"{shown(sorted(grids[1]))} in the image processor: correct the wrong ones"
        )


def _colours(found: Checkpoint) -> Iterator[str]:
    for name in ("image_mean", "image_std"):
        values = found.images.get(name)
        if values is None:
            continue
        numbers = [value for value in _list(values) if isinstance(value, int | float)]
        finite = all(map(math.isfinite, numbers)) and len(numbers) == len(_list(values)) == COLOURS
        if not finite or (name == "image_std" and 0 in numbers):
            yield (
                f"{name} of the image processor is {shown(values)}, and should be {COLOURS} "
                "numbers, one for each colour"
            )


def _steps(found: Checkpoint) -> Iterator[str]:
    for name, value in found.images.items():
        if name in DONE_STEPS and value is not None and not value:
            yield f"the image processor has {name} {shown(value)}, and it is always done here"
        elif name.startswith("do_") and name not in DONE_STEPS | IDLE_STEPS and value:
            yield f"the image processor has {name} {shown(value)}, which is not done here"


def _template(found: Checkpoint) -> Iterator[str]:
    if not found.has_template:
        yield (
            "the model has no chat template; add chat_template.jinja to it (a model of the hub or "
            "behind a URL: copy it into a directory, add it there, and name the directory)"
        )


def _table(found: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    rows = _number(found.text.get("vocab_size"))
    if rows is None:
        return
    if found.table_rows not in (None, rows):
        yield (
            f"the text table has {found.table_rows} rows in the weights, and {rows} in config.json "
            "(text_config.vocab_size): correct it, or copy the model anew"
        )
    named = [(f"the image token ({found.image_token})", found.placeholder)]
    named += [("the end of an answer (eos_token_id)", token) for token in found.ends]
    named += [("recipe.generation.stop_token_ids", token) for token in taken_over.stop_token_ids]
    for what, token in named:
        if token is not None and not 0 <= token < rows:
            yield f"{what} is token {token}, and the text table has {rows} rows, from 0"


def _ends(found: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    known = found.written_ends or found.tokenizer_ends is None or found.tokenizer_ends
    if not known and not taken_over.stop_token_ids:
        yield (
            "no token is named that ends an answer: none in generation_config.json, config.json or "
            "the tokenizer; add eos_token_id to generation_config.json, or set "
            "recipe.generation.stop_token_ids"
        )


def _unfollowed(found: Checkpoint, taken_over: TakenOver) -> Iterator[str]:
    rules = {name: value for name, value in found.rules.items() if name not in taken_over.rules}
    if not rules:
        return
    told = ", ".join(f"{name} {shown(value)}" for name, value in rules.items())
    hint = "name it" if len(rules) == 1 else "name them"
    if "repetition_penalty" in rules:
        hint = f"set recipe.generation.repetition_penalty to follow that one, or {hint}"
    yield (
        f"generation_config.json has rules that answers would not follow: {told}; {hint} in "
        "recipe.generation.ignore_model_rules"
    )

"""`Checkpoint`: what the small files of a checkpoint say, read without the model's libraries.

The files are taken as they are written; what they leave out stays out, because the defaults are
transformers'. `gc2ray.models.checkpoint.consistency` checks what was read here, and
`gc2ray.models.loading` fills in the defaults.

Not covered: weights (`gc2ray.models.checkpoint.tensors`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gc2ray.core.config.generation import rules_in
from gc2ray.core.errors import ConfigError, first_line

IMAGE_TOKEN_KEYS = ("image_token_index", "image_token_id")
"""Keys of config.json for the token that fills an image's place."""
IMAGE_TOKEN_NAMES = ("context_image_token", "image_token")
"""How tokenizers name the placeholder of an image; the former is InternVL's."""
ADDED_TOKENS = '"added_tokens":'
ADAPTER = "adapter_config.json"
FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
    "tokenizer.model", "chat_template.json", "chat_template.jinja", ADAPTER,
)  # fmt: skip
"""The files that are read here."""
BARE_TOKENIZERS = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Tokenizers without an end token unless their files name one."""
QUOTED_CHARACTERS = 120
"""Longest value that a message quotes in full."""


@dataclass(frozen=True)
class Checkpoint:
    """The settings in a checkpoint's small files.

    Attributes:
        name: How messages name the checkpoint.
        config: `config.json`.
        images: Settings of the image processor.
        processor: Other settings of the processor.
        has_template: Whether there is a chat template.
        has_adapter: Whether there is an adapter beside the weights.
        tokens: The tokenizer's ids of special and added tokens.
        written_ends: Token ids that the configurations name as the end of an answer.
        tokenizer_ends: Id of the tokenizer's end token, if it has one; None if the files do not
            say.
        rules: Settings of the generation config that would change answers.
        table_rows: Rows of the text table in the weights; None if the weights were not read.
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
        """The language model's part of `config.json`."""
        return mapping(self.config.get("text_config"))

    @property
    def vision(self) -> Mapping[str, Any]:
        """The vision tower's part of `config.json`."""
        return mapping(self.config.get("vision_config"))

    @property
    def image_token(self) -> str:
        """The placeholder of an image in a rendered prompt."""
        return str(self.processor.get("image_token") or "<image>")

    @property
    def config_image_token(self) -> int | None:
        """Id of the image token in `config.json`; None where it is left out."""
        ids = (number(self.config.get(key)) for key in IMAGE_TOKEN_KEYS)
        return next((token_id for token_id in ids if token_id is not None), None)

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.written_ends or self.tokenizer_ends or ()


def read_checkpoint(directory: Path, name: str) -> Checkpoint:
    """Read the small files of a checkpoint.

    Args:
        directory: The checkpoint's directory.
        name: How messages name the checkpoint.

    Raises:
        ConfigError: There is no model, or a file cannot be read.
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
    text, tokens = mapping(config.get("text_config")), _added_tokens(directory, tokenizer)
    image_token = _image_token(tokenizer) or processor.get("image_token")
    return Checkpoint(
        name=name,
        config=config,
        images=mapping(images),
        processor={**processor, "image_token": image_token},
        has_template=bool(processor.get("chat_template") or _has_templates(directory)),
        has_adapter=(directory / ADAPTER).is_file(),
        tokens=tokens,
        written_ends=next(filter(None, map(_written_ends, (generation, text, config))), ()),
        tokenizer_ends=_tokenizer_ends(directory, tokenizer, tokens),
        # Before transformers had generation_config.json, config.json held these settings.
        rules=rules_in([generation] if generation else [text, config]),
    )


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no such file.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
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
            f"recipe.model.path: {path} should hold an object, {{…}}, and holds {as_json(data)}"
        )
    return data


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def number(value: object) -> int | None:
    """The value if it is an integer; anything else is left to transformers to judge."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _content(token: object) -> str | None:
    """A token's text, which files write as a string or as an object."""
    token = mapping(token).get("content", token)
    return token if isinstance(token, str) else None


def as_json(value: object) -> str:
    """A value for a message, written as JSON and cut where it is long."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= QUOTED_CHARACTERS else f"{text[:QUOTED_CHARACTERS]}…"


def _has_templates(directory: Path) -> bool:
    own = ("chat_template.jinja", "chat_template.json")
    more = directory / "additional_chat_templates"
    return any((directory / name).is_file() for name in own) or any(more.glob("*.jinja"))


def _image_token(tokenizer: Mapping[str, Any]) -> str | None:
    """The tokenizer's name for the placeholder; it has precedence over the processor's."""
    extra = mapping(tokenizer.get("extra_special_tokens"))
    named = (_content(tokenizer.get(name) or extra.get(name)) for name in IMAGE_TOKEN_NAMES)
    return next(filter(None, named), None)


def _added_tokens(directory: Path, tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids of added tokens, special ones among them, that the files agree on."""
    decoder = mapping(tokenizer.get("added_tokens_decoder"))
    claims = [
        *_json(directory / "added_tokens.json").items(),
        *((_content(token), key) for key, token in decoder.items()),
        *_tokenizer_json(directory / "tokenizer.json"),
    ]
    ids: dict[str, set[int]] = {}
    for token, token_id in claims:
        if isinstance(token, str) and isinstance(token_id, int | str) and str(token_id).isdecimal():
            ids.setdefault(token, set()).add(int(token_id))
    return {token: min(claimed) for token, claimed in ids.items() if len(claimed) == 1}


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
        tokens, _ = json.JSONDecoder().raw_decode(text, text.index("[", start))
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"recipe.model.path: {path} cannot be read: {first_line(error)}"
        ) from error
    yield from ((_content(token), mapping(token).get("id")) for token in tokens)


def _written_ends(config: Mapping[str, Any]) -> tuple[int, ...]:
    named = config.get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    ends = tuple(token for token in map(number, listed) if token is not None)
    if len(ends) != len(listed):
        raise ConfigError(
            f"recipe.model.path: eos_token_id is {as_json(named)}, and should be a token id, or a "
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

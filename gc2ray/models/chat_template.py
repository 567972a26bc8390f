"""From a row to the token ids of its prompt.

`PromptSource` makes a prompt's text from a column, a template over columns, or one constant.
`ChatPrompt` puts it into the model's chat template and tokenises it, one placeholder per image.

Row text is untrusted: a special token spelled out in it ("<image>", "</s>") is broken up by a
space, so that it stays text. Templates take plain column names only; nothing is evaluated.

Not covered: system prompts, several turns, few-shot examples.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gc2ray.core.errors import BadRow, ConfigError, Status

NEUTRALISE_ROUNDS = 16


@dataclass(frozen=True)
class PromptSource:
    """Where a prompt's text comes from; exactly one of the three is set."""

    column: str | None = None
    template: str | None = None
    constant: str | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.column, self.template, self.constant)) != 1:
            raise ValueError("set exactly one of column, template, constant")
        if self.constant is not None and not self.constant.strip():
            raise ValueError("the constant is empty")
        if self.template is not None and not self.template.strip():
            raise ValueError("the template is empty")
        self.columns()

    def columns(self) -> tuple[str, ...]:
        """The input columns that the text needs.

        Raises:
            ValueError: The template holds something else than plain `{column}` fields.
        """
        if self.column is not None:
            return (self.column,)
        return () if self.template is None else _fields(self.template)

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of a row.

        Raises:
            BadRow: A needed value is null, NaN or not text (`bad_prompt`).
        """
        values = {name: row[name] for name in self.columns()}
        for name, value in values.items():
            if value is None:
                raise BadRow(Status.BAD_PROMPT, f"prompt column {name!r} is null")
            if value != value:  # what pandas makes of a missing number
                raise BadRow(Status.BAD_PROMPT, f"prompt column {name!r} is not a number")
        if self.column is not None:
            text = values[self.column]
        else:
            text = self.constant if self.template is None else self.template.format(**values)
        if not isinstance(text, str):
            raise BadRow(Status.BAD_PROMPT, f"prompt column {self.column!r} holds {type(text)}")
        if not text.strip():
            raise BadRow(Status.BAD_PROMPT, "the prompt is empty")
        return text


@lru_cache(maxsize=64)
def _fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once; cached, because every row asks."""
    names: list[str] = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"template field {{{name}}}: only plain column names are allowed")
        names.append(name)
    return tuple(dict.fromkeys(names))


class ChatPrompt:
    """A model's chat template and tokenizer.

    Args:
        processor: The model's processor.

    Raises:
        ConfigError: It has no chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        if not processor.chat_template:
            raise ConfigError(
                "recipe.model.path: the model has no chat template; add chat_template.jinja to it"
            )
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content.strip() for token in added if token.special}
        special |= {token.strip() for token in self._tokenizer.all_special_tokens}
        special.add(processor.image_token)
        # A token of one character cannot be broken up; none that matters is that short.
        longest_first = sorted(
            (token for token in special if len(token) > 1), key=len, reverse=True
        )
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, text: str, images: int = 1) -> str:
        """The whole prompt as text, with one image placeholder per image."""
        content: list[dict[str, str]] = [{"type": "image"}] * images
        content = [*content, {"type": "text", "text": self.neutralise(text)}]
        rendered: str = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return rendered

    def encode(self, text: str, images: int = 1) -> list[int]:
        """Token ids of the prompt, one image placeholder id per image."""
        rendered = self.render(text, images)
        bos = self._tokenizer.bos_token
        special = not (bos and rendered.startswith(bos))
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=special)["input_ids"]
        return ids

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Answer text, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip()

    def neutralise(self, text: str) -> str:
        """Row text in which no special token is spelled out any more.

        Raises:
            BadRow: Breaking one up spells out another, again and again.
        """
        for _ in range(NEUTRALISE_ROUNDS):
            if not self._special.search(text):
                return text
            text = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        raise BadRow(Status.BAD_PROMPT, "the text spells out special tokens of the model")

"""`ChatPrompt`: a prompt in the model's chat template, as token ids with a placeholder per image.

Row text is untrusted: a special token spelled out in it ("<image>", "</s>") is broken up by a
space, so that it stays text; and so is any other string that the model takes for a mark.

Not covered: system prompts, several turns, few-shot examples.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from gc2ray.core.errors import BadRow, ConfigError, Status
from gc2ray.models.processor import Processor

NEUTRALISE_ROUNDS = 16


class ChatPrompt:
    """A model's chat template and tokenizer.

    Args:
        processor: The model's processor.
        markers: Strings that mark parts of an image in the prompts of the model; its tokenizer may
            have them as plain tokens ("<row_1_col_1>").

    Raises:
        ConfigError: The processor has no chat template.
    """

    def __init__(self, processor: Processor, markers: Collection[str] = ()) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        if not processor.chat_template:
            raise ConfigError(
                "recipe.model.path: the model has no chat template; add chat_template.jinja to it"
            )
        added = self._tokenizer.added_tokens_decoder.values()
        special = {token.content.strip() for token in added if token.special}
        special |= {token.strip() for token in self._tokenizer.all_special_tokens}
        special |= {processor.image_token, *(marker.strip() for marker in markers)}
        # A token of one character cannot be broken up; none that matters is that short.
        longest_first = sorted(
            (token for token in special if len(token) > 1), key=len, reverse=True
        )
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, text: str, images: int = 1) -> str:
        """The whole prompt as text, with one image placeholder per image."""
        content: list[dict[str, str]] = [{"type": "image"}] * images
        content = [*content, {"type": "text", "text": self.neutralise(text)}]
        return self._processor.render([{"role": "user", "content": content}])

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
        """Row text with every special token and marker in it broken up.

        Raises:
            BadRow: Breaking one up keeps spelling out another.
        """
        for _ in range(NEUTRALISE_ROUNDS):
            if not self._special.search(text):
                return text
            text = self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        raise BadRow(Status.BAD_PROMPT, "the text spells out special tokens of the model")

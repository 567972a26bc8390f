"""`Processor`: tokenizer, image processor and chat template of a checkpoint, loaded one by one.

transformers' own processor classes are not used. Those of models that also read videos cannot be
loaded with Pillow's image processor, because their video processor needs torchvision, and some need
further packages. What is not loaded is not needed: images are cut by
`gc2ray.models.image_processor`, and placeholders are replaced by embeddings, not by longer texts.

Not covered: videos, sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, ProcessorMixin

# Not from the package itself: there transformers 5.10 to 5.17 have none without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.description import IMAGE_TOKEN_NAMES

DEFAULT_PLACEHOLDER = "<image>"
"""The placeholder where neither the tokenizer nor the processor names one."""
PARTS = frozenset({
    "auto_map", "chat_template", "feature_extractor", "image_processor", "processor_class",
    "tokenizer", "video_processor",
})  # fmt: skip
"""Keys of processor_config.json that are no settings of the processor itself."""


@dataclass(frozen=True, eq=False)
class Processor:
    """What makes prompts of a model.

    Attributes:
        tokenizer: transformers' tokenizer.
        image_processor: transformers' image processor, Pillow's.
        chat_template: The chat template, in Jinja; None if the model has none.
        image_token: What a rendered prompt has in the place of one image.
        image_token_id: Its token id. Some models fill the image's place with other tokens than
            this, which their config names.
        settings: Other values of the processor: `patch_size`, `image_seq_len`, …
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str | None
    image_token: str
    image_token_id: int
    settings: Mapping[str, Any]

    @classmethod
    def from_transformers(cls, processor: Any) -> Processor:
        """The parts of a processor of transformers' own."""
        settings = {"image_token": processor.image_token, **processor.to_dict()}
        parts = (processor.tokenizer, processor.image_processor, processor.chat_template)
        return _assembled(*parts, settings)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """Messages in the chat template, as text.

        Args:
            messages: Each has a `role` and a `content`: a text, or a list of images and texts.
            add_generation_prompt: Whether the head of an answer follows.
        """
        rendered: str = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return rendered


def load_processor(path: str, revision: str | None) -> Processor:
    """Load a checkpoint's processor from a directory or the Hugging Face hub.

    Args:
        path: Directory, or hub id.
        revision: Commit or tag of a hub id.

    Raises:
        ConfigError: The tokenizer lacks the image's placeholder.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    # Pillow's, also where torchvision is installed, whose image processors resize differently.
    images = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
    settings, template = processor_settings(path, revision)
    processor = _assembled(tokenizer, images, template, settings)
    if processor.image_token_id is None:
        raise ConfigError(
            f"recipe.model.path: {path}: the tokenizer has no token {processor.image_token}, which "
            "stands for an image in prompts; use the tokenizer that it was published with"
        )
    return processor


def processor_settings(path: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """The processor's settings and its chat template, the default one of several.

    Files have precedence as in transformers: the template in processor_config.json, that in
    chat_template.json, chat_template.jinja. The tokenizer's own template, in tokenizer_config.json,
    is not the processor's: usually it is that of the language model alone, without images.
    """
    settings, _ = ProcessorMixin.get_processor_dict(path, revision=revision)
    templates = settings.get("chat_template")
    if isinstance(templates, list):
        templates = {named["name"]: named["template"] for named in templates}
    template = templates.get("default") if isinstance(templates, dict) else templates
    return settings, template or None


def _assembled(
    tokenizer: Any, images: Any, template: str | None, settings: Mapping[str, Any]
) -> Processor:
    """A processor of its parts; the tokenizer's name for the placeholder has precedence."""
    named = (getattr(tokenizer, name, None) for name in IMAGE_TOKEN_NAMES)
    token = next(filter(None, named), settings.get("image_token")) or DEFAULT_PLACEHOLDER
    token_id = tokenizer.convert_tokens_to_ids(token)
    own = {name: value for name, value in settings.items() if name not in PARTS}
    return Processor(tokenizer, images, template, token, token_id, own)

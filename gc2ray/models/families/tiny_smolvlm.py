"""A small untrained SmolVLM: to train the demo's second model from, and for tests.

Real architecture and real files; random weights. transformers' processor class of SmolVLM needs
torchvision and num2words, so `SmolVlmFiles` stands in for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from gc2ray.models.families.tiny import text_config

TEXT = (
    "User: what is in the picture? Assistant: a photograph of a cat, a cup of coffee and a rocket. "
    "Describe the image in one sentence.\n\nHow many objects are there? Which colour is it?\n\n"
)
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BOS, EOS, PAD = "<|im_start|>", "<end_of_utterance>", "<|im_end|>"
IMAGE, FAKE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
"""The placeholder; then what stands before each view and behind the last; then of the thumbnail."""
MARKED = range(1, 7)
"""Rows and columns of crops that have a marker."""


@dataclass(frozen=True)
class TinySmolVlmSpec:
    """Sizes of a tiny SmolVLM.

    Attributes:
        tile: Side of a view in pixels.
        patch: Side of a patch in pixels.
        scale: Rows, and columns, of patches that make one visual token.
        longest: The longer side of images that are cut, in pixels.
        vision: Width, layers and heads of the tower.
        text: Width, layers, heads and key-value heads of the language model.
        rope_theta: Base of the rotary frequencies.
        corpus: Texts that the tokenizer is trained on; their words become its tokens.
        vocabulary: Tokens at most.
        spread: Standard deviation of the random weights: the tower's, and the others'.
        seed: Seed of the random weights.
    """

    tile: int = 56
    patch: int = 7
    scale: int = 2
    longest: int = 224
    vision: tuple[int, int, int] = (32, 3, 4)
    text: tuple[int, int, int, int] = (48, 2, 4, 4)
    rope_theta: float = 10_000.0
    corpus: tuple[str, ...] = (TEXT,)
    vocabulary: int = 400
    spread: tuple[float, float] = (0.15, 0.15)
    seed: int = 0

    @property
    def patches(self) -> int:
        """Rows, and columns, of patches in a view."""
        return self.tile // self.patch

    @property
    def tokens(self) -> int:
        """Visual tokens of a view."""
        return (self.patches // self.scale) ** 2


@dataclass(frozen=True)
class SmolVlmFiles:
    """Tokenizer, image processor and chat template: what gc2ray reads of a processor.

    Attributes:
        tokenizer: With the chat template.
        image_processor: Pillow's.
        image_seq_len: Visual tokens of a view.
    """

    tokenizer: Any
    image_processor: Any
    image_seq_len: int
    image_token: str = IMAGE

    @property
    def chat_template(self) -> str:
        """The tokenizer's."""
        return str(self.tokenizer.chat_template)

    def to_dict(self) -> dict[str, Any]:
        """The processor's own settings."""
        return {"image_seq_len": self.image_seq_len, "processor_class": "SmolVLMProcessor"}

    def save_pretrained(self, directory: Path) -> None:
        """Write the files that a SmolVLM checkpoint has beside its model's."""
        self.tokenizer.save_pretrained(directory)
        self.image_processor.save_pretrained(directory)
        settings = json.dumps(self.to_dict(), indent=2)
        (directory / "processor_config.json").write_text(f"{settings}\n")


def untrained_smolvlm(spec: TinySmolVlmSpec) -> tuple[Any, SmolVlmFiles]:
    """Model and processor files of `spec`, in memory, float32 on the CPU."""
    tokenizer = _tokenizer(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = SmolVLMForConditionalGeneration(_config(spec, tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": spec.longest}, max_image_size={"longest_edge": spec.tile}
    )
    return model, SmolVlmFiles(tokenizer, images, spec.tokens)


def _tokenizer(spec: TinySmolVlmSpec) -> Any:
    crops = [f"<row_{row}_col_{column}>" for row in MARKED for column in MARKED]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[BOS, EOS, PAD, IMAGE, FAKE, WHOLE, *crops],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(spec.corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={
            "image_token": IMAGE,
            "fake_image_token": FAKE,
            "global_image_token": WHOLE,
            "end_of_utterance_token": EOS,
        },
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def _config(spec: TinySmolVlmSpec, tokenizer: Any) -> Any:
    width, layers, heads = spec.vision
    vision = SmolVLMVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=spec.tile,
        patch_size=spec.patch,
        initializer_range=spec.spread[0],
    )
    text = text_config(
        LlamaConfig, spec.text, tokenizer,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        initializer_range=spec.spread[1],
    )  # fmt: skip
    config_class: Any = SmolVLMConfig  # its signature misses fields that it takes
    return config_class(
        vision_config=vision,
        text_config=text,
        scale_factor=spec.scale,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=spec.spread[1],
    )

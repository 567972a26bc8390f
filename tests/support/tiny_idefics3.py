"""Tiny Idefics3 and SmolVLM checkpoints, and transformers' own processors for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import (
    AutoTokenizer,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    ProcessorMixin,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm

from gc2ray.models.families.tiny_smolvlm import (
    BOS,
    EOS,
    FAKE,
    IMAGE,
    PAD,
    WHOLE,
    TinySmolVlmSpec,
    untrained_smolvlm,
)

IDEFICS3 = TinySmolVlmSpec(tile=65, scale=3, longest=250, seed=1)
"""Its patches do not fill a view, nor its views the longest edge; 2.2B is as odd."""
SMOLVLM = TinySmolVlmSpec(text=(48, 2, 4, 2), seed=2)
ONE_VIEW = TinySmolVlmSpec(scale=4, longest=56, seed=3)
"""Images are never cut."""
SIZES = (
    (56, 56), (60, 90), (200, 100), (112, 112), (300, 310), (90, 333), (400, 300), (7, 200),
    (200, 7), (1000, 420), (1, 1), (1, 3000), (3000, 2),
)  # fmt: skip


def build_smolvlm(directory: Path, spec: TinySmolVlmSpec = SMOLVLM) -> Path:
    """Write a SmolVLM as transformers writes it."""
    model, files = untrained_smolvlm(spec)
    model.save_pretrained(directory)
    files.save_pretrained(directory)
    return directory


def build_idefics3(directory: Path, spec: TinySmolVlmSpec = IDEFICS3) -> Path:
    """Write an Idefics3 in files of 2025.

    The template is in JSON, types go without a backend's name, the tokenizer names no token as the
    image's, and has those that mark crops and thumbnail as plain tokens.
    """
    smolvlm, files = untrained_smolvlm(spec)
    own = smolvlm.config
    config_class: Any = Idefics3Config  # its signature misses fields that it takes
    config = config_class(
        vision_config={**own.vision_config.to_dict(), "model_type": "idefics3_vision"},
        text_config=own.text_config,
        scale_factor=own.scale_factor,
        image_token_id=own.image_token_id,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.load_state_dict(smolvlm.state_dict())
    model.generation_config = smolvlm.generation_config
    model.save_pretrained(directory)
    files.save_pretrained(directory)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": spec.longest}, max_image_size={"longest_edge": spec.tile}
    ).to_dict()
    tokens = json.loads((directory / "tokenizer.json").read_text())
    for token in tokens["added_tokens"]:
        token["special"] &= not token["content"].startswith(("<row_", WHOLE))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    written = {
        "tokenizer.json": tokens,
        "tokenizer_config.json": named
        | {
            "additional_special_tokens": [FAKE, IMAGE, EOS],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "preprocessor_config.json": images | {"image_processor_type": "Idefics3ImageProcessor"},
        "processor_config.json": {**files.to_dict(), "processor_class": "Idefics3Processor"},
        "chat_template.json": {"chat_template": files.chat_template},
    }
    for name, data in written.items():
        (directory / name).write_text(json.dumps(data, indent=2))
    (directory / "chat_template.jinja").unlink()
    return directory


def stock_idefics3(directory: Path) -> Any:
    """transformers' own processor for a directory."""
    tokens = json.loads((directory / "processor_config.json").read_text())["image_seq_len"]
    return Idefics3Processor(**_parts(directory), image_seq_len=tokens)


def stock_smolvlm(directory: Path) -> Any:
    """Likewise, without the video processor, which needs torchvision, and names of numbers."""
    tokens = json.loads((directory / "processor_config.json").read_text())["image_seq_len"]
    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),
        mock.patch.object(processing_smolvlm, "num2words", new=True),
    ):
        return processing_smolvlm.SmolVLMProcessor(
            **_parts(directory), video_processor=None, image_seq_len=tokens
        )


def _parts(directory: Path) -> dict[str, Any]:
    path = str(directory)
    return {
        "tokenizer": AutoTokenizer.from_pretrained(path),
        "image_processor": AutoImageProcessor.from_pretrained(path, backend="pil"),
    }

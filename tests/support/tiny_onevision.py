"""A small untrained LLaVA-OneVision, in the files that checkpoints of 2025 have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from gc2ray.models.families.tiny import TEXT

SIDE, PATCH = 84, 14
TOKENS = SIDE // PATCH
"""Token rows and columns of a view."""
ALLOWED_VIEWS = 4
"""Views' tokens that a canvas may have."""
GRIDS = tuple((rows, columns) for rows in range(1, 5) for columns in range(1, 5))
SIZES = (
    (84, 84), (60, 90), (200, 100), (168, 168), (300, 310), (90, 333), (400, 300), (336, 336),
    (1000, 420), (7, 200), (200, 7), (1, 1), (1, 3000), (251, 85),
)  # fmt: skip
"""Heights and widths: two to seventeen views, canvases that are scaled and not, and none."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEAN = [0.48145466, 0.4578275, 0.40821073]
"""Three values, so that a square's padding has a colour."""
STD = [0.26862954, 0.26130258, 0.27577711]


def build(directory: Path, **changes: Any) -> None:
    """Write model, tokenizer, image processor and chat template.

    Args:
        directory: Where to.
        changes: Other settings of the config: `image_grid_pinpoints`, `vision_aspect_ratio`.
    """
    tokenizer = _tokenizer()
    settings: dict[str, Any] = {
        "image_grid_pinpoints": [[SIDE * rows, SIDE * columns] for rows, columns in GRIDS],
        "vision_aspect_ratio": f"anyres_max_{ALLOWED_VIEWS}",
    }
    settings |= changes
    _model(tokenizer, settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": settings["image_grid_pinpoints"],
            "image_mean": MEAN,
            "image_std": STD,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": SIDE, "width": SIDE},
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": TOKENS**2,
            "vision_aspect_ratio": settings["vision_aspect_ratio"],
            "vision_feature_select_strategy": "full",
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": SIDE, "width": SIDE},
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2))


def stock(directory: Path) -> LlavaOnevisionProcessor:
    """transformers' own processor, without its video processor, which needs torchvision."""
    settings = json.loads((directory / "processor_config.json").read_text())
    del settings["processor_class"]
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"):
        return LlavaOnevisionProcessor(
            image_processor=AutoImageProcessor.from_pretrained(directory, backend="pil"),
            tokenizer=AutoTokenizer.from_pretrained(directory),
            video_processor=None,
            chat_template=CHAT_TEMPLATE,
            **settings,
        )


def _tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        padding_side="left",
    )


def _model(tokenizer: Any, settings: dict[str, Any]) -> Any:
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model

"""A tiny InternVL, in the files that its checkpoints of 2025 have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.internvl.processing_internvl import InternVLProcessor

SIDE, PATCH, MERGE = 56, 7, 2
MOST = 12
START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
NAMES = {
    "start_image_token": START, "end_image_token": END, "context_image_token": CONTEXT,
    "video_token": "<video>",
}  # fmt: skip
SIZES = (
    (56, 56), (40, 60), (30, 30), (200, 100), (112, 112), (300, 310), (90, 333), (400, 300),
    (1000, 420), (7, 200), (1, 1), (1, 3000), (480, 640),
)  # fmt: skip
"""From one view to twelve and a thumbnail."""
CORPUS = (
    "user: what is in the picture? assistant: a photograph of a cat, a cup of coffee.\n"
    "Describe the image in one sentence.\n\nHow many objects are there? Which colour is it?\n"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGES = {
    # False in the files, and turned on by the processor class of transformers.
    "crop_to_patches": False, "min_patches": 1, "max_patches": MOST,
    "size": {"height": SIDE, "width": SIDE}, "crop_size": None, "default_to_square": True,
    "do_center_crop": None, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor",
    "resample": 3, "rescale_factor": 1 / 255,
}  # fmt: skip


def build(directory: Path, backbone: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """Write model, tokenizer, image processor and chat template.

    Args:
        directory: Where.
        backbone: `qwen2`, as InternVL3; `qwen3`, as the largest InternVL3.5 but smaller: its tower
            normalises queries and keys, and has a norm behind its layers; `qwen3_moe`, the same
            with experts.
        seed: Seed of the weights.
        changes: Other settings of the config, or of the vision config.
    """
    tokenizer = _tokenizer()
    model = untrained(tokenizer, backbone, seed, **changes)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    _write(directory / "preprocessor_config.json", IMAGES)
    _write(directory / "video_preprocessor_config.json", {
        "video_processor_type": "InternVLVideoProcessor", "processor_class": "InternVLProcessor",
    })  # fmt: skip
    tokens = model.config.image_seq_length
    _write(
        directory / "processor_config.json",
        {"image_seq_length": tokens, "processor_class": "InternVLProcessor"},
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _as_of_2025(directory / "config.json")
    return directory


def built(backbone: str) -> Callable[[Path], Path]:
    """`build` with a backbone."""
    return lambda directory: build(directory, backbone)


def untrained(tokenizer: Any, backbone: str = "qwen2", seed: int = 0, **changes: Any) -> Any:
    """The model in memory; see `build`."""
    torch.manual_seed(seed)
    config = _config(tokenizer, backbone, changes)
    model = InternVLForConditionalGeneration(config).eval()
    for name, parameter in model.model.named_parameters():
        if "language_model" not in name:  # many of the tower's are 0 or 1 at first, which hides
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            torch.nn.init.normal_(parameter, centre + 0.5 * ("lambda" in name), std=0.12)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def stock(directory: Path) -> Any:
    """transformers' processor; its video processor, which needs torchvision, is left out."""
    settings = json.loads((directory / "processor_config.json").read_text())
    with mock.patch.object(InternVLProcessor, "check_argument_for_proper_class"):
        return InternVLProcessor(
            AutoImageProcessor.from_pretrained(str(directory), backend="pil"),
            AutoTokenizer.from_pretrained(str(directory)),
            None,
            image_seq_length=settings["image_seq_length"],
            chat_template=(directory / "chat_template.jinja").read_text(),
        )


def _tokenizer() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([CORPUS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMES,
    )


def _config(tokenizer: Any, backbone: str, changes: dict[str, Any]) -> Any:
    large = backbone != "qwen2"
    vision: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
        "attention_bias": not large, "use_qk_norm": large, "use_mean_pooling": not large,
        "norm_type": "rms_norm" if large else "layer_norm",
    }  # fmt: skip
    for name in [name for name in changes if hasattr(InternVLVisionConfig(), name)]:
        vision[name] = changes.pop(name)
    text: Any = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}[backbone]
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config: Any = InternVLConfig(
        vision_config=vision,
        text_config=text(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=12, initializer_range=0.12,
            max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **(experts if text is Qwen3MoeConfig else {}),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT),
        tie_word_embeddings=False,
        **{"image_seq_length": 16, "downsample_ratio": 1 / MERGE, **changes},
    )  # fmt: skip
    return config


def _as_of_2025(path: Path) -> None:
    """Sides in pairs, and rotary settings under their names of before."""
    config = json.loads(path.read_text())
    rope = config["text_config"].pop("rope_parameters")
    scaling = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    kind = config["text_config"]["model_type"]
    scaling = scaling if kind == "qwen2" else None
    config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    assert config["vision_config"]["image_size"] == [SIDE, SIDE]
    _write(path, config)


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2))

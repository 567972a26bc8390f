"""Small files of checkpoints of several architectures, as transformers writes them and wrote them.

Configs, tokenizers and processors only: no weights. The processors are transformers' own, without
their video processors, which need torchvision; of those there are settings only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

FAMILIES = ("llava_onevision", "internvl", "idefics3", "smolvlm")
TEXTS = ["User: what is in the picture?\n\nAssistant: a cup. Describe the image in one sentence.\n"]
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
IDEFICS3_NAMES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
NAMES: dict[str, dict[str, str]] = {
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    },
    "idefics3": IDEFICS3_NAMES,
    "smolvlm": IDEFICS3_NAMES,
}
"""Special tokens by the names that their tokenizers give them."""
PLACEHOLDERS = {
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
}
PROCESSORS: dict[str, Any] = {
    "llava_onevision": LlavaOnevisionProcessor,
    "internvl": InternVLProcessor,
    "idefics3": Idefics3Processor,
    "smolvlm": processing_smolvlm.SmolVLMProcessor,
}
VIDEOS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}
SIDE, PATCH = 48, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "num_image_tokens": (SIDE // PATCH) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    },
    "internvl": {"image_seq_length": (SIDE // PATCH // 2) ** 2},
    "idefics3": {"image_seq_len": (SIDE // PATCH // 2) ** 2},
    "smolvlm": {"image_seq_len": (SIDE // PATCH // 2) ** 2},
}
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def template(kind: str) -> str:
    """A chat template that takes texts and lists."""
    return (
        "{% for message in messages %}<s>{{ message['role'] | capitalize }}:"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ '{PLACEHOLDERS[kind]}\n' }}}}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )


def tokenizer(kind: str) -> Any:
    """A tokenizer of bytes, in which markers of rows and columns are plain tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>", *NAMES[kind].values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    if NAMES[kind] is IDEFICS3_NAMES:
        core.add_tokens(ROWS)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=NAMES[kind],
    )


def image_processor(kind: str) -> Any:
    square: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}}
    if kind == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(**square, image_grid_pinpoints=PINPOINTS)
    if kind == "internvl":
        return GotOcr2ImageProcessorPil(**square)
    split: dict[str, Any] = {
        "size": {"longest_edge": 4 * SIDE},
        "max_image_size": {"longest_edge": SIDE},
    }
    return {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[kind](
        **split
    )


def stock_processor(kind: str) -> Any:
    """Transformers' own processor, without a video processor."""
    own: dict[str, Any] = {"image_processor": image_processor(kind), "tokenizer": tokenizer(kind)}
    own |= {"chat_template": template(kind), **SETTINGS[kind]}
    if kind in VIDEOS:
        own["video_processor"] = None
    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),
        mock.patch.object(processing_smolvlm, "num2words", new=True),  # for videos
    ):
        return PROCESSORS[kind](**own)


def write_files(kind: str, directory: Path, *, layout: str = "today") -> Path:
    """Write a checkpoint without weights.

    Args:
        kind: One of `FAMILIES`.
        directory: Where to.
        layout: `today`, or `2025`: image processor and template in files of their own, with the
            type of the image processor that was the default then, and nulls.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processor = stock_processor(kind)
    processor.tokenizer.save_pretrained(directory)
    settings = json.loads(processor.to_json_string())
    if kind in VIDEOS:
        settings["video_processor"] = {"video_processor_type": VIDEOS[kind], "num_frames": 8}
    files = {"config.json": config(kind, processor.tokenizer), "processor_config.json": settings}
    if layout == "2025":
        files |= _files_of_2025(kind, settings, processor.chat_template)
        files["tokenizer_config.json"] = _named_tokens_apart(kind, directory)
        (directory / "chat_template.jinja").unlink(missing_ok=True)
    else:
        (directory / "chat_template.jinja").write_text(processor.chat_template)
    for name, data in files.items():
        (directory / name).write_text(json.dumps(data))
    return directory


def _files_of_2025(kind: str, settings: dict[str, Any], text: str) -> dict[str, Any]:
    images = settings.pop("image_processor")
    images["image_processor_type"] += "Fast"
    images |= {"device": None, "do_center_crop": None, "do_pad": images.get("do_pad")}
    images["processor_class"] = PROCESSORS[kind].__name__
    videos = settings.pop("video_processor", None)
    return {
        "preprocessor_config.json": images,
        "processor_config.json": settings,
        "chat_template.json": {"chat_template": text},
        **({} if videos is None else {"video_preprocessor_config.json": videos}),
    }


def _named_tokens_apart(kind: str, directory: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((directory / "tokenizer_config.json").read_text())
    kept = {name: value for name, value in data.items() if name not in NAMES[kind]}
    return kept | {
        "extra_special_tokens": NAMES[kind],
        "chat_template": "{{ messages[0]['content'] }}",  # the language model's own
    }


def config(kind: str, tokens: Any) -> dict[str, Any]:
    """What config.json says."""
    vocabulary = len(tokens)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "eos_token_id": tokens.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    image = tokens.convert_tokens_to_ids(PLACEHOLDERS[kind])
    own: dict[str, dict[str, Any]] = {
        "llava_onevision": {
            "image_token_index": image,
            "video_token_index": tokens.convert_tokens_to_ids("<video>"),
            "image_grid_pinpoints": PINPOINTS,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": {"model_type": "siglip_vision_model", **vision},
        },
        "internvl": {
            "image_token_id": image,
            "image_seq_length": 9,
            "downsample_ratio": 0.5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": {"model_type": "qwen2", **text},
            "vision_config": {
                "model_type": "internvl_vision",
                **vision,
                "image_size": [SIDE, SIDE],
                "patch_size": [PATCH, PATCH],
            },
        },
        "idefics3": {
            "image_token_id": image,
            "scale_factor": 2,
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "idefics3", **vision},
        },
    }  # fmt: skip
    own["smolvlm"] = own["idefics3"] | {"vision_config": {"model_type": "smolvlm_vision", **vision}}
    return {"model_type": kind, "tie_word_embeddings": False, **own[kind]}

"""Models that gc2ray does not load, by name, each with the reason.

gc2ray keeps those tokens of an image that its crops and its thumbnail show to be important. A model
needs such views, tokens that each stand for a place in the image, and a language model that reads
them as a sequence of embeddings with plain positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gc2ray.models.checkpoint.description import as_json

NOT_YET = "which is not supported yet"
ONE_VIEW = "which sees an image as one view: there are no crops to choose tokens from"
ROTATED = f"whose positions have three dimensions, and {ONE_VIEW}"
CROSS = "which reads images by cross-attention: they have no tokens in the prompt"
QUERIES = "whose image tokens are learned queries, which have no place in the image"
BOTH_WAYS = (
    "whose image tokens attend to later ones, too; the decoders here attend to earlier ones only"
)
DEEP = "which adds image features in several layers of its language model, not only before it"
RAGGED = "whose crops have any shape, and token grids of different sizes"
VIDEOS = "which is made for videos; only images are read here"
REMOTE = "whose code comes with its files, and is never run"

_REASONS: dict[str, tuple[str, ...]] = {
    NOT_YET: ("aya_vision", "cohere2_vision", "lfm2_vl"),
    ONE_VIEW: (
        "blip-2", "chameleon", "deepseek_vl", "fuyu", "gemma3n", "hyperclovax_vision_v2",
        "instructblip", "kimi_k25", "lfm3_vl", "lighton_ocr", "llava", "mistral3",
        "nemotron_h_omni", "paligemma", "pixtral", "vipllava",
    ),
    ROTATED: (
        "glm46v", "glm4v", "glm4v_moe", "paddleocr_vl", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl",
        "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
    ),
    CROSS: ("idefics", "mllama"),
    f"{QUERIES}; its successor is HuggingFaceM4/Idefics3-8B-Llama3": ("idefics2",),
    QUERIES: ("aria", "deepseek_ocr2", "unlimited_ocr"),
    BOTH_WAYS: ("gemma3", "molmo2", "step3p7"),
    DEEP: ("granite4_vision", "granite_docling"),
    RAGGED: ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
    VIDEOS: ("llava_next_video", "video_llama_3", "video_llava"),
    REMOTE: (
        "deepseek_vl_v2", "minicpmo", "minicpmv", "molmo", "ovis", "phi3_v", "phi4mm",
    ),
    "which keeps padded crops in the prompt and reads it in chunks": ("llama4",),
    "whose image processor needs torchvision, and whose adapters are switched by the input": (
        "phi4_multimodal",
    ),
    "whose image tokens are mixtures of a visual vocabulary": ("ovis2",),
    "whose vision tower needs timm, and whose image processor needs torchvision": (
        "perception_lm",
    ),
}  # fmt: skip
UNSUPPORTED: dict[str, str] = {kind: why for why, kinds in _REASONS.items() for kind in kinds}
"""Reasons by `model_type`, as relative clauses."""
CONVERSIONS: dict[str, str] = {
    "internvl_chat": "a conversion, whose name ends in -hf: OpenGVLab/InternVL3-8B-hf, for example",
    "llava_qwen": (
        "a conversion, of those at https://huggingface.co/llava-hf: "
        "llava-hf/llava-onevision-qwen2-7b-ov-hf, for example"
    ),
}
"""What to name in place of a model in another layout, by `model_type`."""
CONVERTED = "its conversion, of those at https://huggingface.co/llava-hf"


def said(kind: object) -> str:
    """How messages name a model's type."""
    if kind is None:
        return "its config.json names no model_type"
    return f"it is {'an' if str(kind)[:1] in 'aeiou' else 'a'} {kind} model"


def why_unsupported(config: Mapping[str, Any]) -> str | None:
    """What keeps a model from being loaded; None if nothing is known of it here.

    Args:
        config: Its `config.json`.
    """
    kind, names = config.get("model_type"), config.get("architectures") or ()
    if isinstance(kind, str) and kind in UNSUPPORTED:
        return f"{said(kind)}, {UNSUPPORTED[kind]}"
    if isinstance(kind, str) and kind in CONVERSIONS:
        return (
            f"it is in the layout of its authors (model_type {as_json(kind)}), which transformers "
            f"does not load; name {CONVERSIONS[kind]}"
        )
    if any(key.startswith("mm_") for key in config) or any(
        str(name).startswith("Llava") and str(name).endswith("ForCausalLM") for name in names
    ):
        return (
            f"it is in the layout of LLaVA's authors (model_type {as_json(kind)}), which "
            f"transformers does not load; name {CONVERTED}"
        )
    return None

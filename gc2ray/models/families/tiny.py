"""A small untrained LLaVA-NeXT: for benchmarks and tests, and to train the demo's model from.

Real architecture, real processor, real files; random weights, so its answers mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

TEXT = (
    "USER: what is in the picture? ASSISTANT: a photograph of a cat, a cup of coffee and a rocket. "
    "Describe the image in one sentence. How many objects are there? Which colour is it?"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

FACTORS = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.3,
    "logits_scaling": 4.0,
}  # fmt: skip
"""Granite's, of a size with those of Granite Vision."""


@dataclass(frozen=True)
class TinySpec:
    """Sizes of a tiny model.

    Attributes:
        image_size: Side of a view in pixels; the pinpoints are its multiples.
        patch_size: Side of a patch in pixels.
        vision: Width, layers and heads of the tower.
        text: Width, layers, heads and key-value heads of the language model.
        backbone: `llama`, `mistral` or `granite`.
        tower: `clip` or `siglip`, which has no class token.
        grids: Crop grids (rows, columns) that the pinpoints allow.
        vision_layers: Hidden states that make the features.
        activation: Activation of the tower's feed-forward layers.
        rope_theta: Base of the rotary frequencies.
        corpus: Texts that the tokenizer is trained on; their words become its tokens.
        vocabulary: Tokens at most.
        table: Rows of the language model's table at least; no text has the tokens behind the
            tokenizer's, but the model may write them.
        vision_ffn: Width of the tower's feed-forward layers; None is twice the tower's.
        text_ffn: Width of the language model's; None is twice the language model's.
        spread: Standard deviation of the random weights.
        seed: Seed of the random weights.
    """

    image_size: int = 84
    patch_size: int = 14
    vision: tuple[int, int, int] = (32, 3, 4)
    text: tuple[int, int, int, int] = (48, 2, 4, 4)
    backbone: str = "llama"
    tower: str = "clip"
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    vision_layers: int | tuple[int, ...] = -2
    activation: str = "quick_gelu"
    rope_theta: float = 10_000.0
    corpus: tuple[str, ...] = (TEXT,)
    vocabulary: int = 400
    table: int = 0
    vision_ffn: int | None = None
    text_ffn: int | None = None
    spread: float = 0.15
    seed: int = 0


def build_tiny(directory: Path, spec: TinySpec | None = None) -> Path:
    """Write model, tokenizer and processor of `spec` to a directory, and return it."""
    model, processor = untrained(spec or TinySpec())
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def untrained(
    spec: TinySpec, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Model and transformers' processor of `spec`, in memory; a large model on its own device.

    Args:
        spec: Sizes of the model.
        device: Device that the weights are made on; None is the CPU.
        dtype: Dtype of the weights.
    """
    tokenizer = _tokenizer(spec)
    config = _config(spec, tokenizer)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.random.fork_rng(devices=[]), device or torch.device("cpu"):
            torch.manual_seed(spec.seed)
            model = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, _processor(spec, tokenizer, config)


def _tokenizer(spec: TinySpec) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(spec.corpus, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def _config(spec: TinySpec, tokenizer: Any) -> Any:
    width, layers, heads = spec.vision
    vision: Any = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[spec.tower](
        hidden_size=width,
        intermediate_size=spec.vision_ffn or 2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        hidden_act=spec.activation,
    )
    if spec.tower == "clip":
        vision.projection_dim = width
    backbones = {"llama": LlamaConfig, "mistral": MistralConfig, "granite": GraniteConfig}
    others: dict[str, Any] = dict(FACTORS) if spec.backbone == "granite" else {}
    if spec.text_ffn is not None:
        others["intermediate_size"] = spec.text_ffn
    text = text_config(
        backbones[spec.backbone], spec.text, tokenizer,
        vocab_size=max(len(tokenizer), spec.table),
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        initializer_range=spec.spread,
        **others,
    )  # fmt: skip
    config_class: Any = LlavaNextConfig  # its signature misses fields that it takes
    return config_class(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        image_grid_pinpoints=_pinpoints(spec),
        vision_feature_layer=(
            spec.vision_layers if isinstance(spec.vision_layers, int) else list(spec.vision_layers)
        ),
        vision_feature_select_strategy=_strategy(spec),
        initializer_range=spec.spread,
    )


def text_config(kind: Any, sizes: tuple[int, int, int, int], tokenizer: Any, **others: Any) -> Any:
    """The config of a tiny language model.

    Args:
        kind: Its class.
        sizes: Width, layers, heads and key-value heads.
        tokenizer: Its tokenizer.
        others: Settings that are not the usual ones.
    """
    width, layers, heads, kv_heads = sizes
    usual = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": 8192,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return kind(**usual | others)


def _strategy(spec: TinySpec) -> str:
    """Which of a layer's tokens are features: all but the class token, or all."""
    return "default" if spec.tower == "clip" else "full"


def _pinpoints(spec: TinySpec) -> list[list[int]]:
    return [[rows * spec.image_size, columns * spec.image_size] for rows, columns in spec.grids]


def _processor(spec: TinySpec, tokenizer: Any, config: Any) -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": spec.image_size},
        crop_size={"height": spec.image_size, "width": spec.image_size},
        image_grid_pinpoints=_pinpoints(spec),
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(spec.tower == "clip"),
        chat_template=CHAT_TEMPLATE,
    )

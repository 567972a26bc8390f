"""The small files that the hub had of each family in 2024 and 2025, made of those of today.

Keys, values and names of classes are those that transformers 4.45 to 4.57 wrote, and those that
models were published with; sizes are those of the tiny models.
"""

from __future__ import annotations

from typing import Any

Data = dict[str, Any]
TEXT_KEYS = frozenset({
    "bos_token_id", "eos_token_id", "head_dim", "hidden_size", "intermediate_size",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta",
    "vocab_size",
})  # fmt: skip
VISION_KEYS = frozenset({
    "hidden_size", "image_size", "intermediate_size", "model_type", "num_attention_heads",
    "num_hidden_layers", "patch_size",
})  # fmt: skip
LANGUAGE_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The language model's own, without images, which tokenizers were published with."""


def _text(config: Data, architecture: str, **more: Any) -> Data:
    """Rotary settings have names of their own, and defaults are left out."""
    text = dict(config["text_config"])
    text["rope_theta"] = text.pop("rope_parameters", text).get("rope_theta")
    kept = {key: value for key, value in text.items() if key in TEXT_KEYS}
    return {"_name_or_path": "", "architectures": [architecture], "torch_dtype": "bfloat16"} | (
        kept | more
    )


def _vision(config: Data, **more: Any) -> Data:
    return {key: config["vision_config"][key] for key in VISION_KEYS} | more


def _tokenizer(kind: str, processor: str, end: str, pad: str, **more: Any) -> Data:
    return {
        "add_prefix_space": False,
        "chat_template": LANGUAGE_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": pad,
        "processor_class": processor,
        "tokenizer_class": kind,
        **more,
    }


def _images(images: Data, kind: str, processor: str, **more: Any) -> Data:
    return images | {"image_processor_type": kind, "processor_class": processor} | more


def _generation(config: Data) -> Data:
    ends = {"eos_token_id": config["text_config"]["eos_token_id"]}
    return {"_from_model_config": True, "transformers_version": "4.45.0", **ends}


def llava_next(config: Data, images: Data) -> Data:
    """LLaVA-1.6, of early 2024: Vicuna's config does not say which token ends an answer."""
    processor, tokens = "LlavaNextProcessor", {"bos_token": "<s>"}
    text = _text(config, "LlamaForCausalLM")
    del text["eos_token_id"]
    return {
        "config.json": {
            "architectures": config["architectures"],
            "ignore_index": -100,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_token_index": config["image_token_index"],
            "model_type": "llava_next",
            "projector_hidden_act": "gelu",
            "text_config": text,
            "torch_dtype": "float16",
            "transformers_version": "4.39.0.dev0",
            "use_image_newline_parameter": True,
            "vision_config": _vision(config, projection_dim=768, vocab_size=32000),
            "vision_feature_layer": config["vision_feature_layer"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
        },
        "generation_config.json": _generation(config),
        "preprocessor_config.json": _images(images, "LlavaNextImageProcessor", processor),
        "processor_config.json": {"processor_class": processor},
        "tokenizer_config.json": _tokenizer(
            "PreTrainedTokenizerFast", processor, "</s>", "<pad>", **tokens
        ),
    }


def granite_vision(config: Data, images: Data) -> Data:
    """Granite Vision 3.x, of 2025: factors are written as integers."""
    own, written = config["text_config"], llava_next(config, images)
    factors = {
        name: int(own[name]) if own[name] == int(own[name]) else own[name]
        for name in own
        if name.endswith("_multiplier") or name == "logits_scaling"
    }
    square = {"height": images["size"]["shortest_edge"], "width": images["size"]["shortest_edge"]}
    written["config.json"] |= {
        "image_seq_length": 576,
        "multimodal_projector_bias": True,
        "pad_token_id": 0,
        "text_config": _text(
            config, "GraniteForCausalLM", attention_bias=False, rope_scaling=None, **factors
        ),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0",
        "vision_config": _vision(config, _name_or_path="", torch_dtype="bfloat16"),
    }
    written["preprocessor_config.json"] |= {"size": square, "crop_size": square}
    written["processor_config.json"] |= {
        "image_token": "<image>",
        "num_additional_image_tokens": 0,
        "patch_size": config["vision_config"]["patch_size"],
        "vision_feature_select_strategy": "full",
    }
    return written


def llava_onevision(config: Data, images: Data) -> Data:
    """LLaVA-OneVision, of 2024: the tokenizer names no token as the image's."""
    processor = "LlavaOnevisionProcessor"
    return {
        "config.json": {
            "architectures": config["architectures"],
            "ignore_index": -100,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_token_index": config["image_token_index"],
            "model_type": "llava_onevision",
            "projector_hidden_act": "gelu",
            "text_config": _text(
                config, "Qwen2ForCausalLM", max_window_layers=2, sliding_window=32768,
                use_sliding_window=False,
            ),
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.45.0.dev0",
            "use_image_newline_parameter": True,
            "video_token_index": config["video_token_index"],
            "vision_aspect_ratio": config["vision_aspect_ratio"],
            "vision_config": _vision(config, vision_use_head=False),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "generation_config.json": _generation(config),
        "preprocessor_config.json": _images(images, "LlavaOnevisionImageProcessor", processor),
        "video_preprocessor_config.json": _images(
            images, "LlavaOnevisionImageProcessor", processor,
            video_processor_type="LlavaOnevisionVideoProcessor",
        ),
        "processor_config.json": {
            "image_token": "<image>",
            "num_image_tokens": 36,
            "processor_class": processor,
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        },
        "tokenizer_config.json": _tokenizer(
            "Qwen2Tokenizer", processor, "<|im_end|>", "<|endoftext|>", bos_token=None,
            additional_special_tokens=["<|im_start|>", "<|im_end|>"], unk_token=None,
        ),
    }  # fmt: skip


def internvl(config: Data, images: Data) -> Data:
    """InternVL3 and InternVL3.5, of 2025."""
    own, text = config["vision_config"], config["text_config"]["model_type"]
    architecture = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[text]
    processor = "InternVLProcessor"
    names = {
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "start_image_token": "<img>",
        "video_token": "<video>",
    }
    nulls = dict.fromkeys(("data_format", "device", "input_data_format", "return_tensors"))
    return {
        "config.json": {
            "architectures": config["architectures"],
            "downsample_ratio": 0.5,
            "image_seq_length": 16,
            "image_token_id": config["image_token_id"],
            "model_type": "internvl",
            "projector_hidden_act": "gelu",
            "text_config": _text(
                config, architecture, max_window_layers=70, moe_config=None,
                sliding_window=None, use_cache=True, use_sliding_window=False,
            ),
            "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0.dev0",
            "vision_config": _vision(
                config, architectures=["InternVisionModel"], attention_bias=own["attention_bias"],
                attention_dropout=0.0, dropout=0.0, hidden_act="gelu", hidden_dropout_prob=0.0,
                initializer_factor=0.1, layer_norm_eps=1e-6, layer_scale_init_value=0.1,
                norm_type=own["norm_type"], num_channels=3, projection_dropout=0.0,
                torch_dtype="bfloat16", use_absolute_position_embeddings=True,
                use_mask_token=False, use_mean_pooling=own["use_mean_pooling"],
                use_qk_norm=own["use_qk_norm"],
            ),
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        },
        "generation_config.json": _generation(config),
        "preprocessor_config.json": _images(images, "GotOcr2ImageProcessorFast", processor) | nulls,
        "processor_config.json": {"image_seq_length": 16, "processor_class": processor},
        "tokenizer_config.json": _tokenizer(
            "Qwen2Tokenizer", processor, "<|im_end|>", "<|endoftext|>", bos_token=None,
            additional_special_tokens=["<|im_start|>", "<|im_end|>", *names.values()],
            extra_special_tokens=names, return_token_type_ids=False, unk_token=None, **names,
        ),
    }  # fmt: skip


def _llama(config: Data) -> Data:
    """Text settings of the trainer that Idefics3 and SmolVLM come from."""
    return _text(
        config, "VLlama3ForCausalLM", neftune_noise_alpha=0.0, perceiver_config={
            "attention_dropout": 0.0, "model_type": "vllama3", "resampler_n_latents": 64,
            "tie_word_embeddings": True, "top_k": 50,
        },
        pixel_shuffle_factor=config["scale_factor"], qk_layer_norms=False, rope_interleaved=False,
        use_resampler=False,
    )  # fmt: skip


def idefics3(config: Data, images: Data) -> Data:
    """Idefics3-8B, of 2024: the tokenizer names no token as the image's."""
    processor = "Idefics3Processor"
    side = images["max_image_size"]["longest_edge"] // config["vision_config"]["patch_size"]
    return {
        "config.json": {
            "architectures": config["architectures"],
            "image_token_id": config["image_token_id"],
            "model_type": "idefics3",
            "pad_token_id": 128_002,
            "scale_factor": config["scale_factor"],
            "text_config": _llama(config),
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.46.0.dev0",
            "use_cache": True,
            "vision_config": _vision(
                config, model_type="idefics3", tie_word_embeddings=False, use_base_siglip=True
            ),
            "vocab_size": config["text_config"]["vocab_size"],
        },
        "generation_config.json": _generation(config),
        "preprocessor_config.json": _images(images, "Idefics3ImageProcessor", processor),
        "processor_config.json": {
            "image_seq_len": (side // config["scale_factor"]) ** 2,
            "processor_class": processor,
        },
        "tokenizer_config.json": _tokenizer(
            "PreTrainedTokenizerFast", processor, "<end_of_utterance>", "<|im_end|>",
            additional_special_tokens=[
                "<fake_token_around_image>", "<image>", "<end_of_utterance>",
            ],
            bos_token="<|im_start|>",
        ),
    }  # fmt: skip


def smolvlm(config: Data, images: Data) -> Data:
    """SmolVLM2, of 2025: the vision config has settings of the image processor."""
    written, processor = idefics3(config, images), "SmolVLMProcessor"
    edges = {name: images[name] for name in ("max_image_size", "size")}
    names = {
        "end_of_utterance_token": "<end_of_utterance>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "image_token": "<image>",
    }
    written["config.json"] |= {
        "model_type": "smolvlm",
        "transformers_version": "4.47.1",
        "use_cache": False,
        "use_reentrant_checkpointing": False,
        "vision_config": _vision(config, **edges, tie_word_embeddings=False, use_base_siglip=False),
    }
    sampling = {"fps": 1, "max_frames": 64, "video_size": images["max_image_size"]}
    written["preprocessor_config.json"] = _images(
        images, "SmolVLMImageProcessor", processor, video_sampling=sampling
    )
    written["processor_config.json"]["processor_class"] = processor
    written["tokenizer_config.json"] |= {
        "extra_special_tokens": names,
        "processor_class": processor,
        "truncation_side": "left",
        "unk_token": "<|endoftext|>",
        **names,
    }
    return written

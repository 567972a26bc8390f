"""Checkpoints in the files that the hub had of each family, with something broken in them.

Each is refused, before anything is answered, in a line that names the file or the setting.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gc2ray.core.errors import ConfigError
from gc2ray.models import loading
from tests.support.commands import run_command
from tests.support.model_files import (
    CONFIG,
    GENERATION,
    PROCESSOR,
    TEXT,
    TOKENIZER,
    VISION,
    Change,
    all_of,
    edited,
    without,
)
from tests.support.old_layouts import LAYOUTS, WEIGHTS, Tensors, write_old
from tests.support.rows import job_data, write_rows

IMAGES = "preprocessor_config.json"
GRANITE, ONEVISION, INTERNVL, IDEFICS3, SMOLVLM = PUBLISHED = (
    "granite-vision 2025",
    "onevision 7B 2024",
    "internvl3 8B 2025",
    "idefics3 8B 2024",
    "smolvlm2 500M 2025",
)
LLAVAS, SCALED = (GRANITE, ONEVISION), (IDEFICS3, SMOLVLM)
TOWER, PROJECTOR, LANGUAGE, HEAD, NEWLINE = (
    r"encoder\.layers?\.1\..*q_proj\.weight",
    r"(linear_1|modality_projection\.proj)\.weight",
    r"(language|text)_model.*layers\.1\.mlp\.up_proj\.weight",
    r"lm_head\.weight",
    "image_newline",
)
PARTS = [
    *((name, part) for name in PUBLISHED for part in (TOWER, PROJECTOR, LANGUAGE, HEAD)),
    *((name, NEWLINE) for name in LLAVAS),
    (INTERNVL, "cls_token"),
    (INTERNVL, r"layer\.1\.lambda_1"),
]
"""A pattern of one tensor of each part of each family."""


def tensors(change: Callable[[Tensors], Tensors]) -> Change:
    def changed(model: Path) -> None:
        save_file(change(load_file(model / WEIGHTS)), model / WEIGHTS, {"format": "pt"})

    return changed


def dropped(part: str) -> Change:
    return tensors(lambda found: {name: found[name] for name in found if not re.search(part, name)})


def shortened(part: str) -> Change:
    return tensors(
        lambda found: {
            name: value[..., :-1].clone() if re.search(part, name) else value
            for name, value in found.items()
        }
    )


def as_integers(found: Tensors) -> Tensors:
    return {
        name: value.to(torch.int8) if re.search(LANGUAGE, name) else value
        for name, value in found.items()
    }


def with_prefix(found: Tensors) -> Tensors:
    return {f"base_model.model.{name}": value for name, value in found.items()}


def template_of(model: Path) -> Path:
    (file,) = model.glob("chat_template.*")
    return file


def without_template(model: Path) -> None:
    """The tokenizer's own is still there, which is for texts alone."""
    template_of(model).unlink()


def without_image_in_template(model: Path) -> None:
    without_template(model)
    (model / "chat_template.jinja").write_text("{{ messages[0]['role'] }}: hello")


def without_placeholder(model: Path) -> None:
    """The language model's tokenizer, from before it got tokens for images."""
    mark = "<IMG_CONTEXT>" if "<IMG_CONTEXT>" in template_of(model).read_text() else "<image>"
    file = model / "tokenizer.json"
    tokens = json.loads(file.read_text())
    tokens["added_tokens"] = [one for one in tokens["added_tokens"] if one["content"] != mark]
    tokens["model"]["vocab"]["another"] = tokens["model"]["vocab"].pop(mark)
    file.write_text(json.dumps(tokens))
    (model / TOKENIZER).write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def own_type(kind: str) -> Change:
    return edited(CONFIG, model_type=kind, auto_map={"AutoModel": "modeling_own.OwnModel"})


BROKEN: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "another image token": (
        LLAVAS,
        edited(CONFIG, image_token_index=7),
        r"image token is 7 in config\.json \(image_token_index\), and 3 in the tokenizer",
    ),
    "another image token id": (
        (INTERNVL, *SCALED),
        edited(CONFIG, image_token_id=7),
        r"image token is 7 in config\.json \(image_token_id\), and \d in the tokenizer",
    ),
    "two image tokens": (
        PUBLISHED,
        edited(CONFIG, image_token_index=8, image_token_id=9),
        r"config\.json names two image tokens: .*8.*9.*; leave the wrong one out",
    ),
    "no placeholder": (
        PUBLISHED,
        without_placeholder,
        "the tokenizer has no token <image>, which stands for an image in prompts",
    ),
    "no image in the template": (
        PUBLISHED,
        without_image_in_template,
        r"its chat template makes 0 image tokens \(<(image|IMG_CONTEXT)>, \d\) of one image",
    ),
    "no template": (PUBLISHED, without_template, "has no chat template; add chat_template.jinja"),
    "views": (
        (*LLAVAS, INTERNVL),
        edited(IMAGES, size={"height": 70, "width": 70}),
        r"cuts views of 70 pixels \(size\), the vision tower takes \d+ \(vision_config\.image_size",
    ),
    "longest edge of a view": (
        SCALED,
        edited(IMAGES, max_image_size={"longest_edge": 63}),
        r"cuts views of 63 pixels \(max_image_size\), the vision tower takes \d+",
    ),
    "another tower": (
        PUBLISHED,
        edited(*VISION, model_type="vit"),
        "the vision tower is vit, and should be",
    ),
    "another processor": (
        PUBLISHED,
        edited(IMAGES, image_processor_type="CLIPImageProcessor"),
        r"is \"CLIPImageProcessor\" \(image_processor_type\), and images are cut as \w+ does",
    ),
    "no processor": (PUBLISHED, without(IMAGES), r"no preprocessor_config\.json, and no image_pr"),
    "no tokenizer": (PUBLISHED, without("tokenizer.json"), r"no tokenizer\.json; copy the model"),
    "tokens of a view": (
        (ONEVISION,),
        edited(PROCESSOR, num_image_tokens=729),
        r"num_image_tokens is 729 in the processor, .* in config\.json make 36 tokens of a view",
    ),
    "shuffled tokens": (
        (INTERNVL,),
        edited(PROCESSOR, image_seq_length=256),
        r"image_seq_length is 256 in the processor, .* in config\.json make 16 tokens of a view",
    ),
    "scaled tokens": (
        SCALED,
        edited(PROCESSOR, image_seq_len=169),
        r"image_seq_len is 169 in the processor, .* in config\.json make \d+ tokens of a view",
    ),
    "ratio": (
        (INTERNVL,),
        edited(CONFIG, downsample_ratio=0.25),
        "image_seq_length is 16 in the processor, .* make 4 tokens of a view",
    ),
    "odd ratio": (
        (INTERNVL,),
        edited(CONFIG, downsample_ratio=0.3),
        r"downsample_ratio in config\.json is 0\.3, and should merge 8 x 8 patches",
    ),
    "factor": (SCALED, edited(CONFIG, scale_factor=5), r"scale_factor in config\.json is 5, and"),
    "patches": (
        (GRANITE,),
        edited(PROCESSOR, patch_size=16),
        r"patch_size is 16 in the processor, and 14 in config\.json",
    ),
    "strategy": (
        LLAVAS,
        edited(CONFIG, vision_feature_select_strategy="default"),
        "vision_feature_select_strategy is 'default', and a tower of type siglip_vision_model nee",
    ),
    "pinpoints": (
        LLAVAS,
        edited(IMAGES, image_grid_pinpoints=[[84, 168]]),
        r"in config\.json, and \[\[84, 168\]\] in the image processor: correct the wrong ones",
    ),
    "no pinpoints": (
        LLAVAS,
        edited(CONFIG, image_grid_pinpoints=None),
        r"image_grid_pinpoints are \[\[3\d\d, .* in config\.json, and \[\[84, 84\], .* in the im",
    ),
    "a longer table": (
        PUBLISHED,
        edited(*TEXT, vocab_size=500),
        r"text table has \d+ rows in the weights, and 500 in config\.json \(text_config\.vocab_",
    ),
    "more layers": (
        PUBLISHED,
        edited(*TEXT, num_hidden_layers=3),
        r"lacks (9|12) of the model's \d+ tensors, .*layers\.2\.input_layernorm\.weight",
    ),
    "fewer layers": (
        PUBLISHED,
        edited(*TEXT, num_hidden_layers=1),
        r"has (9|12) tensors of parts that its config\.json leaves out",
    ),
    "quantised": (
        PUBLISHED,
        edited(CONFIG, quantization_config={"quant_method": "bitsandbytes"}),
        r"config\.json has quantization_config \(bitsandbytes\); .* name the original",
    ),
    "quantised weights": (
        PUBLISHED,
        tensors(as_integers),
        r"has quantised weights \(1 tensors, the first is .*up_proj\.weight of type I8\)",
    ),
    "adapter": (
        PUBLISHED,
        edited("adapter_config.json", r=8),
        r"it has an adapter \(adapter_config\.json\), .*; merge it into the weights",
    ),
    "names of an adapter": (
        PUBLISHED,
        tensors(with_prefix),
        r"lacks (\d+) of the model's \1 tensors.*; it has others instead .*: base_model\.model\.",
    ),
    "code of its own": (
        PUBLISHED,
        own_type("own_vl"),
        "it is an own_vl model, whose code comes with its files, and is never run; supported: ",
    ),
    "the authors' InternVL": (
        (INTERNVL,),
        own_type("internvl_chat"),
        r"layout of its authors \(model_type \"internvl_chat\"\), .*; name a conversion, .* -hf",
    ),
    "the authors' OneVision": (
        (ONEVISION,),
        own_type("llava_qwen"),
        r"layout of its authors \(model_type \"llava_qwen\"\), .*; name a conversion, .*llava-hf",
    ),
    "no end": (
        PUBLISHED,
        all_of(
            without(GENERATION), edited(*TEXT, eos_token_id=None), edited(TOKENIZER, eos_token="")
        ),
        "no token is named that ends an answer",
    ),
}  # fmt: skip
CASES = [(name, case) for case, (names, *_) in BROKEN.items() for name in names]


@pytest.fixture
def model(today: Any, tmp_path: Path) -> Callable[[str], Path]:
    """Published ones to be broken: with a head of their own, in one file."""

    def of(name: str) -> Path:
        layout = replace(LAYOUTS[name], tied=False, shards=1, config={}, text={})
        return write_old(layout, today(layout.family, tied=False), tmp_path / "model")

    return of


def refusal(model: Path) -> str:
    """What it is refused with, in one line of moderate length."""
    with pytest.raises(ConfigError) as caught:
        loading.load(str(model), revision=None, dtype="float32", device="cpu")
    message = str(caught.value)
    assert message.startswith(f"recipe.model.path: {model}")
    assert "\n" not in message
    assert len(message) < 600 + len(str(model))
    return message


@pytest.mark.parametrize("name", PUBLISHED)
def test_unbroken_they_load(model: Any, name: str) -> None:
    loading.load(str(model(name)), revision=None, dtype="float32", device="cpu")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_broken_checkpoint_is_refused(model: Any, name: str, case: str) -> None:
    directory = model(name)
    _, change, expected = BROKEN[case]
    change(directory)
    assert re.search(expected, refusal(directory))


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_missing_tensor_is_named(model: Any, name: str, part: str) -> None:
    directory = model(name)
    dropped(part)(directory)
    assert re.search(
        rf"lacks 1 of the model's \d+ tensors, .* random numbers: \S*{part}", refusal(directory)
    )


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_tensor_of_another_size_is_named(model: Any, name: str, part: str) -> None:
    directory = model(name)
    shortened(part)(directory)
    assert re.search(
        rf"has 1 tensors of other sizes .* says: \S*{part} has \(.*\), not \(", refusal(directory)
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_commands_end_with_two(model: Any, tmp_path: Path, name: str) -> None:
    directory = model(name)
    edited(IMAGES, image_processor_type="CLIPImageProcessor")(directory)
    source = write_rows(tmp_path / "rows.parquet", 4)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(job_data(directory, source, tmp_path / "out")))
    caught = run_command("estimate", job)
    assert (caught.exit_code, "CLIPImageProcessor" in caught.stderr) == (2, True)

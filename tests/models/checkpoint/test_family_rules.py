"""What checkpoints of each architecture say twice, in the files of 2025 and of today."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText

from gc2ray.core.config.generation import NOTHING
from gc2ray.core.errors import ConfigError
from gc2ray.models import loading
from gc2ray.models.checkpoint import consistency
from gc2ray.models.checkpoint.consistency import check_directory
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES
from tests.support.family_files import FAMILIES, write_files
from tests.support.model_files import (
    CONFIG,
    IMAGES,
    PROCESSOR,
    TEXT,
    TOKENIZER,
    VISION,
    Change,
    all_of,
    edited,
    without,
)

ONEVISION, INTERNVL, IDEFICS3, SMOLVLM = FAMILIES
REFUSED: dict[str, tuple[tuple[str, ...], Change, str]] = {
    "processor": (
        FAMILIES,
        edited(*IMAGES, image_processor_type="LlavaNextImageProcessor"),
        r"the image processor is \"LlavaNextImageProcessor\" .* cut as \w+Processor does",
    ),
    "tower": (
        FAMILIES,
        edited(*VISION, model_type="clip_vision_model"),
        r"the vision tower is clip_vision_model, and should be \w+",
    ),
    "placeholder": (
        (INTERNVL, IDEFICS3, SMOLVLM),
        edited(CONFIG, image_token_id=7),
        r"image token is 7 in config\.json \(image_token_id\), and 3 in the tokenizer \(<",
    ),
    "placeholder's older name": (
        (ONEVISION,),
        edited(CONFIG, image_token_index=7),
        r"is 7 in config\.json \(image_token_index\), and 3 in the tokenizer \(<image>\)",
    ),
    "placeholder in the tokenizer": (
        (INTERNVL,),
        edited(TOKENIZER, context_image_token="</img>"),
        r"is 3 in config\.json .*, and 5 in the tokenizer \(</img>\)",
    ),
    "view": (
        (ONEVISION, INTERNVL),
        edited(*IMAGES, size={"height": 48, "width": 56}),
        r"views of 56 pixels \(size\), the vision tower takes 48",
    ),
    "crop": (
        (ONEVISION,),
        edited(*IMAGES, crop_size={"height": 56, "width": 56}),
        r"views of 56 pixels \(crop_size\), the vision tower takes 48",
    ),
    "longest edge of a view": (
        (IDEFICS3, SMOLVLM),
        edited(*IMAGES, max_image_size={"longest_edge": 56}),
        r"views of 56 pixels \(max_image_size\), the vision tower takes 48",
    ),
    "no longest edge": (
        (IDEFICS3, SMOLVLM),
        edited(*IMAGES, size={"height": 192, "width": 192}),
        r"size of the image processor is .*, and should be {\"longest_edge\": PIXELS}",
    ),
    "plain view": (
        (IDEFICS3, SMOLVLM),
        edited(*IMAGES, max_image_size=48),
        r"max_image_size of the image processor is 48, and should be {\"longest_edge\"",
    ),
    "oblong view": (
        (INTERNVL,),
        edited(*VISION, image_size=[48, 56]),
        r"vision_config\.image_size .* is \[48, 56\], and should be pixels",
    ),
    "pair": (
        (ONEVISION, IDEFICS3, SMOLVLM),
        edited(*VISION, image_size=[48, 48]),
        r"vision_config\.image_size .* is \[48, 48\], and should be pixels",
    ),
    "no sides": ((INTERNVL,), edited(*VISION, patch_size=[]), r"patch_size .* is \[\], and"),
    "strategy": (
        (ONEVISION,),
        edited(CONFIG, vision_feature_select_strategy="default"),
        "strategy is 'default', and a tower .* needs 'full'",
    ),
    "class token": (
        (INTERNVL,),
        edited(CONFIG, vision_feature_select_strategy="full"),
        "strategy is 'full', and a tower .* needs 'default'",
    ),
    "processor's strategy": (
        (ONEVISION,),
        edited(PROCESSOR, vision_feature_select_strategy="default"),
        r"strategy is \"full\" in config\.json, and \"default\" in the processor",
    ),
    "layer": (
        (ONEVISION, INTERNVL),
        edited(CONFIG, vision_feature_layer=-4),
        r"takes features from layer -4 .* tower has 2 ",
    ),
    "several layers": (
        (INTERNVL,),
        edited(CONFIG, vision_feature_layer=[-1, -2]),
        r"vision_feature_layer .* is \[-1, -2\], and should be one layer's number",
    ),
    "aspect ratio": (
        (ONEVISION,),
        edited(PROCESSOR, vision_aspect_ratio="anyres_max_4"),
        r"vision_aspect_ratio is \"anyres_max_9\" in config\.json, and \"anyres_max_4\" in the",
    ),
    "odd aspect ratio": (
        (ONEVISION,),
        edited(CONFIG, vision_aspect_ratio="pad"),
        r"vision_aspect_ratio in config\.json is \"pad\", and should be",
    ),
    "pinpoints": (
        (ONEVISION,),
        edited(*IMAGES, image_grid_pinpoints=[[48, 96]]),
        r"and \[\[48, 96\]\] in the image processor",
    ),
    "uneven pinpoints": (
        (ONEVISION,),
        all_of(
            edited(CONFIG, image_grid_pinpoints=[[48, 96], [48, 100]]),
            edited(*IMAGES, image_grid_pinpoints=[[48, 100], [48, 96]]),
        ),
        r"has \[48, 100\], which cannot be cut into views of 48 pixels",
    ),
    "tokens of a view": (
        (ONEVISION,),
        edited(PROCESSOR, num_image_tokens=35),
        r"num_image_tokens is 35 in the processor, .* make 36 tokens of a view",
    ),
    "shuffled tokens": (
        (INTERNVL,),
        edited(PROCESSOR, image_seq_length=16),
        r"image_seq_length is 16 in the processor, .* make 9 tokens of a view",
    ),
    "noted tokens": (
        (INTERNVL,),
        edited(CONFIG, image_seq_length=16),
        r"image_seq_length in config\.json is 16, and its sizes make 9 tokens of a view",
    ),
    "ratio": (
        (INTERNVL,),
        edited(CONFIG, downsample_ratio=0.25),
        r"downsample_ratio in config\.json is 0\.25, and should merge 6 x 6 patches",
    ),
    "another ratio": (
        (INTERNVL,),
        edited(CONFIG, downsample_ratio=1 / 3),
        "image_seq_length is 9 in the processor, .* make 4 tokens of a view",
    ),
    "no ratio": ((INTERNVL,), edited(CONFIG, downsample_ratio=0), "downsample_ratio .* is 0, and"),
    "fewest tiles": (
        (INTERNVL,),
        edited(*IMAGES, min_patches=0),
        "min_patches .* is 0, and should",
    ),
    "tiles": ((INTERNVL,), edited(*IMAGES, max_patches="12"), 'max_patches .* is "12", and'),
    "tiles the wrong way": (
        (INTERNVL,),
        edited(*IMAGES, min_patches=5, max_patches=4),
        "has min_patches 5, above max_patches 4",
    ),
    "scaled tokens": (
        (IDEFICS3, SMOLVLM),
        edited(PROCESSOR, image_seq_len=64),
        r"image_seq_len is 64 in the processor, .* make 9 tokens of a view",
    ),
    "factor": (
        (IDEFICS3, SMOLVLM),
        edited(CONFIG, scale_factor=4),
        r"scale_factor in config\.json is 4, and should divide the 6 patches",
    ),
    "another factor": (
        (IDEFICS3, SMOLVLM),
        edited(CONFIG, scale_factor=3),
        "image_seq_len is 9 in the processor, .* make 4 tokens of a view",
    ),
    "no factor": ((SMOLVLM,), edited(CONFIG, scale_factor=0), "scale_factor .* is 0, and should"),
    "one view": (
        (IDEFICS3, SMOLVLM),
        edited(*IMAGES, do_image_splitting=False),
        "do_image_splitting false, and it is always done here",
    ),
    **{
        name: (FAMILIES, edited(*IMAGES, **{name: False}), f"{name} false, and it is always done")
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
    },
    "unknown step": (FAMILIES, edited(*IMAGES, do_flip=True), "do_flip true, which is not done"),
    "table": (
        FAMILIES,
        edited(*TEXT, vocab_size=3),
        r"image token \(<(image|IMG_CONTEXT)>\) is token 3, and the text table has 3 rows",
    ),
    "template": (FAMILIES, without("chat_template.jinja"), "the model has no chat template"),
}
ACCEPTED: dict[str, tuple[tuple[str, ...], Change]] = {
    "cropping on": ((INTERNVL,), edited(*IMAGES, crop_to_patches=True)),
    "cropping off": ((INTERNVL,), edited(*IMAGES, crop_to_patches=False)),
    "no padding": (FAMILIES, edited(*IMAGES, do_pad=False)),
    "plain sizes": ((INTERNVL,), edited(*VISION, image_size=48, patch_size=8)),
    "defaults": ((INTERNVL,), edited(CONFIG, image_seq_length=None)),
    "no settings": ((IDEFICS3, SMOLVLM), edited(PROCESSOR, image_seq_len=None)),
    "of the other": (
        (IDEFICS3, SMOLVLM),
        edited(*IMAGES, image_processor_type="Idefics3ImageProcessorFast"),
    ),
    "another's strategy": (
        (IDEFICS3, SMOLVLM),
        edited(CONFIG, vision_feature_select_strategy="full"),
    ),
    "experts": (
        (INTERNVL,),
        edited(*TEXT, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, head_dim=8),
    ),
}


@pytest.fixture(autouse=True)
def _supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consistency, "MODEL_TYPES", tuple(FAMILY_RULES))


def described(model: Path) -> None:
    """Everything before the weights, with transformers' defaults filled in."""
    loading._described(str(model), None, NOTHING, weights=False)


@pytest.mark.parametrize("layout", ["today", "2025"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_files_of_each_architecture_are_accepted(
    tmp_path: Path, kind: str, layout: str
) -> None:
    model = write_files(kind, tmp_path / "model", layout=layout)
    found = check_directory(model, weights=False)
    assert found.tokens[found.image_token] == found.config_image_token == 3
    described(model)


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for case, (kinds, *_) in REFUSED.items() for kind in kinds]
)
def test_contradictions_are_refused(tmp_path: Path, kind: str, case: str) -> None:
    _, change, message = REFUSED[case]
    model = write_files(kind, tmp_path / "model")
    change(model)
    with pytest.raises(ConfigError, match=message) as caught:
        check_directory(model, weights=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for case, (kinds, _) in ACCEPTED.items() for kind in kinds]
)
def test_what_changes_nothing_is_accepted(tmp_path: Path, kind: str, case: str) -> None:
    model = write_files(kind, tmp_path / "model")
    ACCEPTED[case][1](model)
    check_directory(model, weights=False)
    described(model)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (ONEVISION, edited(*IMAGES, size=None), r"views of 384 pixels \(size\).*takes 48"),
        (INTERNVL, edited(*IMAGES, size=None), r"views of 384 pixels \(size\).*takes 48"),
        (SMOLVLM, edited(*IMAGES, max_image_size=None), r"views of 364 pixels \(max_image_size\)"),
        (INTERNVL, edited(CONFIG, image_token_id=None), r"is 151667 in config\.json"),
        (IDEFICS3, edited(*VISION, image_size=None), r"views of 48 pixels .*takes 224"),
    ],
)
def test_omitted_values_are_checked_at_loading(
    tmp_path: Path, kind: str, change: Change, message: str
) -> None:
    model = write_files(kind, tmp_path / "model")
    change(model)
    check_directory(model, weights=False)
    with pytest.raises(ConfigError, match=message):
        described(model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_are_read_by_their_names(tmp_path: Path, kind: str) -> None:
    """The text table is found, and no tensor is taken for another one."""
    model = write_files(kind, tmp_path / "model")
    config = AutoConfig.from_pretrained(model)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights" / "model.safetensors").rename(model / "model.safetensors")
    assert check_directory(model).table_rows == config.text_config.vocab_size


def test_supported_architectures_have_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {*consistency.MODEL_TYPES} <= {*FAMILY_RULES}
    assert {*FAMILIES} < {*FAMILY_RULES}

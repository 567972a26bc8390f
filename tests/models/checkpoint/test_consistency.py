"""What a checkpoint's files say: held against each other before anything is loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from gc2ray.core.config.generation import OTHER_SETTINGS, RULES, TakenOver
from gc2ray.core.errors import ConfigError
from gc2ray.models import loading, registry
from gc2ray.models.checkpoint.consistency import MODEL_TYPES, check_directory
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES
from tests.support.model_files import (
    CONFIG,
    GENERATION,
    IMAGES,
    PROCESSOR,
    TEXT,
    TOKENIZER,
    VISION,
    Change,
    all_of,
    edited,
    holding,
    without,
)


def replaced(file: str, old: str, new: str) -> Change:
    def change(model: Path) -> None:
        text = (model / file).read_text()
        assert old in text
        (model / file).write_text(text.replace(old, new))

    return change


def tokens(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change to the added tokens of `tokenizer.json`."""

    def apply(model: Path) -> None:
        data = json.loads((model / "tokenizer.json").read_text())
        for token in data["added_tokens"]:
            change(token)
        (model / "tokenizer.json").write_text(json.dumps(data))

    return apply


def moved(token: dict[str, Any]) -> None:
    token["id"] = 9 if token["content"] == "<image>" else token["id"]


def renamed_file(name: str) -> Change:
    return lambda model: (model / "model.safetensors").rename(model / name)


def indexed(*files: str) -> Change:
    weights = {"weight_map": {str(number): file for number, file in enumerate(files)}}
    return holding("model.safetensors.index.json", json.dumps(weights).encode())


def shortened(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


LARGE = 10**6
DONE_STEPS = FAMILY_RULES["llava_next"].done_steps
NO_END = all_of(
    edited(GENERATION, eos_token_id=None),
    edited(*TEXT, eos_token_id=None),
    edited(TOKENIZER, eos_token=None),
)
REFUSED: dict[str, tuple[Change, str]] = {
    # Not what can be loaded.
    "no config": (without(CONFIG), r"there is no model in .*model \(no config\.json\)"),
    "config null": (holding(CONFIG, b"null"), r"config\.json should hold an object.* holds null"),
    "config empty": (holding(CONFIG, b""), r"config\.json cannot be read: Expecting value"),
    "not text": (holding(GENERATION, b"\xff\xfe{}"), r"generation_config\.json cannot be read"),
    "nested": (holding(GENERATION, b"[" * 10**5), r"generation_config\.json cannot be read"),
    "tokenizer": (holding("tokenizer.json", b'{"added_tokens": [}'), "tokenizer.json cannot be"),
    "no type": (edited(CONFIG, model_type=None), "names no model_type; supported: llava_next"),
    "list of types": (edited(CONFIG, model_type=["a"]), r"is a \['a'\] model; supported"),
    "other type": (edited(CONFIG, model_type="git"), "is a git model; supported: llava_next"),
    "authors' class": (
        edited(CONFIG, model_type="llava_llama", architectures=["LlavaLlamaForCausalLM"]),
        r"layout of LLaVA's authors \(model_type \"llava_llama\"\).*llava-hf",
    ),
    "authors' keys": (edited(CONFIG, mm_vision_tower="clip"), "layout of LLaVA's authors"),
    "adapter": (edited("adapter_config.json", r=8), r"has an adapter .* merge it into the weights"),
    "quantised": (
        edited(CONFIG, quantization_config={"quant_method": "awq"}),
        r"quantization_config \(awq\); quantised checkpoints are not supported",
    ),
    "quantised text": (
        edited(*TEXT, quantization_config={"quant_method": "gptq"}),
        r"text_config\.quantization_config \(gptq\)",
    ),
    "quantised tower": (
        edited(*VISION, quantization_config={"bits": 4}),
        r"vision_config\.quantization_config \(of no named method\)",
    ),
    "compressed": (
        edited(CONFIG, compression_config={"quant_method": "compressed-tensors"}),
        r"compression_config \(compressed-tensors\)",
    ),
    "tower": (edited(*VISION, model_type="dinov2"), "tower is dinov2, and should be clip_vision"),
    "patches": (
        edited(*VISION, model_type="siglip_vision_model"),
        "siglip_vision_model needs 'full'",
    ),
    "strategy": (edited(CONFIG, vision_feature_select_strategy="full"), "strategy is 'full'"),
    "layer": (edited(CONFIG, vision_feature_layer=-5), r"from layer -5 .* tower has 3 "),
    "layers": (edited(CONFIG, vision_feature_layer=[-1, 4]), r"from layer 4 .* tower has 3 "),
    "no template": (without("chat_template.jinja"), "no chat template.*add it there, and name"),
    # Said twice, and not the same.
    "placeholder": (edited(CONFIG, image_token_index=7), r"is 7 in config\.json .*, and 3 in the"),
    "placeholder's new name": (
        edited(CONFIG, image_token_index=None, image_token_id=7),
        r"is 7 in config\.json \(image_token_id\), and 3 in the tokenizer \(<image>\)",
    ),
    "two placeholders": (
        edited(CONFIG, image_token_id=7),
        r"two image tokens: .*\"image_token_index\": 3, \"image_token_id\": 7",
    ),
    "placeholder in tokenizer.json": (
        all_of(tokens(moved), edited(TOKENIZER, added_tokens_decoder=0)),
        r"is 3 in config\.json .*, and 9 in the tokenizer",
    ),
    "placeholder of another name": (
        edited(TOKENIZER, image_token={"content": "<pad>"}),
        r"is 3 in config\.json .*, and 2 in the tokenizer \(<pad>\)",
    ),
    "placeholder of an extra token": (
        edited(TOKENIZER, image_token=None, extra_special_tokens={"image_token": "<pad>"}),
        r"is 3 in config\.json .*, and 2 in the tokenizer \(<pad>\)",
    ),
    "placeholder beyond the table": (
        edited(*TEXT, vocab_size=3),
        r"image token \(<image>\) is token 3, and the text table has 3 rows",
    ),
    "end token beyond the table": (
        edited(GENERATION, eos_token_id=[1, LARGE]),
        rf"end of an answer \(eos_token_id\) is token {LARGE}, and the text table has \d+ rows",
    ),
    "negative end token": (edited(GENERATION, eos_token_id=-1), "is token -1, and the text"),
    "end token as text": (edited(GENERATION, eos_token_id="</s>"), 'eos_token_id is "</s>", and'),
    "table": (edited(*TEXT, vocab_size=LARGE), rf"has \d+ rows in the weights, and {LARGE} in"),
    "size": (edited(*IMAGES, size={"shortest_edge": 90}), r"views of 90 pixels \(size\).*takes 84"),
    "plain size": (edited(*IMAGES, size=90), r"views of 90 pixels \(size\).*takes 84"),
    "width": (edited(*IMAGES, size={"height": 84, "width": 90}), r"of 90 pixels \(size\)"),
    "crop size": (edited(*IMAGES, crop_size={"height": 90, "width": 84}), r"90 pixels \(crop_size"),
    "tower's size": (edited(*VISION, image_size=90), r"of 84 pixels \(size\).*takes 90"),
    "patch size": (edited(PROCESSOR, patch_size=7), "patch_size is 7 in the processor, and 14 in"),
    "patch of size 0": (edited(*VISION, patch_size=0), r"vision_config\.patch_size .* is 0, and"),
    "size in words": (edited(*VISION, image_size="84"), r"image_size in config\.json is \"84\""),
    "pinpoints": (
        edited(CONFIG, image_grid_pinpoints=[[84, 168]]),
        r"are \[\[84, 168\]\] in config\.json, and \[\[84, 168\], \[84, 252\], .* in the image",
    ),
    "uneven pinpoints": (
        all_of(
            edited(CONFIG, image_grid_pinpoints=[[84, 168], [100, 100]]),
            edited(*IMAGES, image_grid_pinpoints=[[84, 168], [100, 100]]),
        ),
        r"has \[100, 100\], which cannot be cut into views of 84 pixels",
    ),
    "no pinpoints": (edited(CONFIG, image_grid_pinpoints=[]), r"of config\.json is \[\], and"),
    "odd pinpoints": (edited(*IMAGES, image_grid_pinpoints="x"), 'of the image processor is "x"'),
    "flat pinpoints": (edited(*IMAGES, image_grid_pinpoints=[[0, 84]]), r"is \[\[0, 84\]\], and"),
    # What would not be done.
    **{name: (edited(*IMAGES, **{name: False}), f"{name} false") for name in sorted(DONE_STEPS)},
    "unknown step": (edited(*IMAGES, do_flip=True), "do_flip true, which is not done here"),
    "no text layers": (
        edited(CONFIG, "text_config", num_hidden_layers=0),
        r"text_config\.num_hidden_layers in config\.json is 0, and should be above 0",
    ),
    "half a tower": (
        edited(CONFIG, "vision_config", num_attention_heads=-1),
        r"vision_config\.num_attention_heads .* is -1",
    ),
    "another's images": (
        edited(*IMAGES, image_processor_type="LlavaOnevisionImageProcessor"),
        r"the image processor is .LlavaOnevisionImageProcessor. .*as LlavaNextImageProcessor does",
    ),
    "no mean": (edited(*IMAGES, image_mean=[]), r"image_mean .* is \[\], and should be 3 numbers"),
    "no deviation": (edited(*IMAGES, image_std=[1, 0, 1]), r"image_std .* is \[1, 0, 1\]"),
    "odd deviation": (edited(*IMAGES, image_std=[1, float("nan"), 1]), "image_std .*NaN"),
    "no factor": (edited(*IMAGES, rescale_factor=0), "rescale_factor .* is 0, and should be a num"),
    "null for a factor": (
        replaced(PROCESSOR, f'"rescale_factor": {1 / 255}', '"rescale_factor": null'),
        "rescale_factor .* is null",
    ),
    "words for a factor": (edited(*IMAGES, rescale_factor="1/255"), 'rescale_factor .* is "1/255"'),
    "endless factor": (edited(*IMAGES, rescale_factor=float("inf")), "rescale_factor .* Infinity"),
    "unknown filter": (edited(*IMAGES, resample=6), "resample .* is 6, and should be .*0 to 5"),
    "no filter": (
        replaced(PROCESSOR, '"resample": 3', '"resample": null'),
        "resample .* is null",
    ),
    "a filter by name": (edited(*IMAGES, resample="bicubic"), 'resample .* is "bicubic"'),
    "no end": (NO_END, r"no token is named that ends .*recipe\.generation\.stop_token_ids"),
    "a rule": (
        edited(GENERATION, repetition_penalty=1.3),
        r"repetition_penalty 1\.3; set recipe\.generation\.repetition_penalty .* or name it in "
        r"recipe\.generation\.ignore_model_rules",
    ),
    "rules": (
        edited(GENERATION, no_repeat_ngram_size=2, suppress_tokens=[5]),
        r"no_repeat_ngram_size 2, suppress_tokens \[5\]; name them in recipe",
    ),
    "legacy rule": (
        all_of(without(GENERATION), edited(*TEXT, min_length=9)),
        "would not follow: min_length 9; name it",
    ),
    # Weights that are not there, not whole, or not what they seem.
    "no weights": (without("model.safetensors"), "has no weights: no model.safetensors and no"),
    "no tokenizer": (without("tokenizer.json"), r"has no tokenizer: no tokenizer\.json; copy the"),
    "no images": (
        edited(PROCESSOR, image_processor=None),
        r"how its images are cut: no preprocessor_config\.json, and no image_processor in proc",
    ),
    "code of its own": (
        edited(CONFIG, model_type="own_vl", auto_map={"AutoModel": "modeling_own.OwnModel"}),
        "is an own_vl model, whose code comes with its files, and is never run; supported: llava",
    ),
    "pickles": (renamed_file("pytorch_model.bin"), "pickles only, .* never loaded; .* convert"),
    "no index": (renamed_file("model-00001-of-00001.safetensors"), "but neither model.safetens"),
    "shard gone": (
        all_of(renamed_file("a.safetensors"), indexed("a.safetensors", "b.safetensors")),
        r"has no b\.safetensors, which is one of the 2 files that .*index\.json names",
    ),
    "odd index": (
        all_of(renamed_file("a"), holding("model.safetensors.index.json", b"[]")),
        "is no index of weights",
    ),
    "no bytes": (holding("model.safetensors", b""), "not a safetensors file, or damaged"),
    "long header": (holding("model.safetensors", b"\xff" * 99), "not a safetensors file, or"),
    "cut short": (shortened, r"is damaged: \d+ bytes, and its header describes \d+; copy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictory_or_unsupported_files_are_refused(model: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(model)
    with pytest.raises(ConfigError, match=message) as caught:
        check_directory(model)
    assert str(caught.value).startswith("recipe.model.path: ")
    assert str(model) in str(caught.value) or case == "end token as text"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["placeholder", "no end", "quantised", "pinpoints", "a rule"])
def test_loading_refuses_the_same_contradictions(model: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(model)
    with pytest.raises(ConfigError, match=message):
        loading.load_metadata(str(model), dtype="float32")
    with pytest.raises(ConfigError, match=message):
        loading.load(str(model), revision=None, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "change",
    [
        edited(GENERATION, do_sample=True, temperature=0.7, top_k=20, max_length=4096),
        edited(GENERATION, **{name: idle for name, idle in RULES.items() if idle is not None}),
        edited(GENERATION, forced_eos_token_id=0, num_beams=1),
        edited(GENERATION, eos_token_id=[1, 2]),
        edited(*IMAGES, do_center_crop=False, size={"height": 84, "width": 84}, crop_size=84),
        edited(*IMAGES, image_mean=None, do_pad=None, do_flip=False),
        holding("preprocessor_config.json", b'{"do_normalize": false}'),  # the newer file counts
        replaced(PROCESSOR, '"do_normalize": true', '"do_normalize": null'),  # the default
        edited(
            CONFIG, image_grid_pinpoints=[[84, 252], [168, 84], [84, 168], [252, 84], [168] * 2]
        ),
        edited(CONFIG, image_grid_pinpoints=None),  # the default is transformers' to say
        edited(CONFIG, image_token_index=None, quantization_config={}),
        edited(*TEXT, vocab_size=None, bos_token_id=None),
        edited(TOKENIZER, added_tokens_decoder={"2": {"content": "<image>"}}),  # or 3, says another
        edited(PROCESSOR, patch_size=None, num_additional_image_tokens=None),
        all_of(holding("training_args.bin", b"?"), holding("trainer_state.json", b"")),
        all_of(
            without("chat_template.jinja"),
            edited("chat_template.json", chat_template="{{ messages }}"),
        ),
    ],
)
def test_a_consistent_model_is_accepted(model: Path, change: Change) -> None:
    """Nor what a file leaves out, as long as the model's libraries have not filled it in."""
    change(model)
    ignored = TakenOver(rules=frozenset({"forced_eos_token_id"}))
    check_directory(model, ignored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edited(CONFIG, image_token_index=None),
            r"is 32000 in config\.json .*, and 3 in the.*what a file leaves out",
        ),
        (
            edited(CONFIG, image_grid_pinpoints=None),
            r"are \[\[336, 672\], .* in config\.json, and.*what a file leaves out",
        ),
        (
            edited(*VISION, image_size=None),
            r"views of 84 pixels \(size\).* takes 224.*what a file leaves out",
        ),
        (
            edited(*VISION, patch_size=None),
            "patch_size is 14 in the processor, and 32 in config.*what a file leaves out",
        ),
        (
            edited(*TEXT, vocab_size=None),
            r"rows in the weights, and 32000 in config\.json.*what a file leaves out",
        ),
        (
            edited(*IMAGES, size=None),
            r"views of 224 pixels \(size\).*takes 84.*what a file leaves out",
        ),
        (
            holding("chat_template.jinja", b"{{ messages[0]['role'] }}: {{ 'hello' }}"),
            r"makes 0 image tokens \(<image>, 3\) of one image",
        ),
        (holding("chat_template.jinja", b"<image><image>"), "makes 2 image tokens"),
        (holding("chat_template.jinja", b"{% if %}"), "cannot be loaded: TemplateSyntaxError: "),
    ],
)
def test_omitted_values_are_checked_at_loading(model: Path, change: Change, message: str) -> None:
    change(model)
    with pytest.raises(ConfigError, match=message):
        loading.load(str(model), revision=None, dtype="float32", device="cpu")


def with_a_longer_tokenizer(model: Path) -> None:
    """One that has more tokens than the model has rows, and a template that writes such a token."""
    data = json.loads((model / "tokenizer.json").read_text())
    more = {**data["added_tokens"][0], "id": LARGE, "content": "<more>"}
    data["added_tokens"].append(more)
    (model / "tokenizer.json").write_text(json.dumps(data))
    (model / "chat_template.jinja").write_text("<image><more>")


def test_a_prompt_with_tokens_beyond_the_table_is_refused(model: Path) -> None:
    with_a_longer_tokenizer(model)
    with pytest.raises(
        ConfigError, match=r"prompts have token \d+, and the text table has \d+ row"
    ):
        loading.load_metadata(str(model), dtype="float32")


def test_a_recipe_may_say_where_answers_end(model: Path) -> None:
    NO_END(model)
    check_directory(model, TakenOver(stop_token_ids=(4,)))
    with pytest.raises(ConfigError, match=r"stop_token_ids is token 1000000, and the text table"):
        check_directory(model, TakenOver(stop_token_ids=(LARGE,)))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_refused_unless_the_recipe_takes_it_over(model: Path, rule: str) -> None:
    edited(GENERATION, **{rule: 3})(model)
    with pytest.raises(ConfigError, match=f"would not follow: {rule} 3; "):
        check_directory(model)
    check_directory(model, TakenOver(rules=frozenset({rule})))


def test_every_setting_of_transformers_is_a_rule_or_known_to_be_none() -> None:
    """A new one in a new release is to be looked at."""
    settings = {*GenerationConfig().to_dict(), *vars(GenerationConfig())}
    settings = {name for name in settings if not name.startswith("_")}
    assert settings - {*RULES} - OTHER_SETTINGS == set()
    assert {*RULES} & OTHER_SETTINGS == set()


def test_idle_values_of_rules_are_transformers_defaults() -> None:
    defaults = GenerationConfig._get_default_generation_params()
    for name, idle in RULES.items():
        assert defaults.get(name) in (None, idle)


def test_model_types_are_those_of_the_families() -> None:
    assert set(MODEL_TYPES) == {*registry.FAMILIES}


def test_a_sentencepiece_model_alone_is_reported(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model / "tokenizer.model").touch()
    with caplog.at_level(logging.WARNING):
        check_directory(model)
        assert caplog.messages == []
        (model / "tokenizer.json").unlink()
        check_directory(model)
    (message,) = caplog.messages
    assert "tokenizer.model is a sentencepiece model without a tokenizer.json" in message

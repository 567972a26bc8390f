"""A checkpoint's processor, loaded in parts: its prompts are those of transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from gc2ray.core.errors import ConfigError
from gc2ray.models import loading
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.processor import Processor, load_processor
from tests.support.family_files import FAMILIES, SETTINGS, stock_processor, write_files
from tests.support.model_files import (
    PROCESSOR,
    TOKENIZER,
    Change,
    all_of,
    copy_of,
    edited,
    holding,
    rewrite,
    without,
)

OWN = "chat_template.jinja"
TYPED = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] | trim }}{% endfor %}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
"""Takes texts and lists, puts images first, and has marks of the tokenizer."""
MARKED = (
    "{% for message in messages %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{{ pad_token }}{% endfor %}{% if image_token %}{{ image_token }}{% endif %}"
)
"""Has a block of transformers' own, and tokens that only some tokenizers name."""


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "image and text": [{"role": "user", "content": [IMAGE, text("What is it?")]}],
    "images": [{"role": "user", "content": [IMAGE, text("a"), IMAGE, text(" b "), IMAGE]}],
    "text alone": [{"role": "user", "content": [text("ünïcödé 猫\n")]}],
    "a string": [{"role": "user", "content": " as it is "}],
    "several turns": [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [IMAGE, text("What is it?")]},
        {"role": "assistant", "content": [text("A cup.")]},
        {"role": "user", "content": [text("Which colour?")]},
    ],
    "nulls": [{"role": "user", "content": [text("a")], "name": None}],
}


@pytest.fixture
def model(tiny_paths: dict[str, Path], tmp_path: Path) -> Path:
    return copy_of(tiny_paths["vicuna"], tmp_path / "model")


def stock(path: Path) -> Any:
    return AutoProcessor.from_pretrained(path, backend="pil")


@pytest.mark.parametrize(
    ("template", "case"),
    [
        *((None, case) for case in CONVERSATIONS if case != "a string"),  # it takes lists only
        *((template, case) for template in (TYPED, MARKED) for case in CONVERSATIONS),
    ],
)
def test_prompts_are_those_of_transformers(model: Path, template: str | None, case: str) -> None:
    if template is not None:
        (model / OWN).write_text(template)
    messages, processor = CONVERSATIONS[case], load_processor(str(model), None)
    for prompted in (True, False):
        wanted = stock(model).apply_chat_template(messages, add_generation_prompt=prompted)
        assert processor.render(messages, add_generation_prompt=prompted) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        edited(PROCESSOR, chat_template="of the processor"),
        edited("chat_template.json", chat_template="of the older file"),
        all_of(
            edited(PROCESSOR, chat_template="of the processor"),
            edited("chat_template.json", chat_template="of the older file"),
        ),
        all_of(
            without(OWN),
            edited("chat_template.json", chat_template="of the older file"),
            edited(TOKENIZER, chat_template="of the tokenizer"),
        ),
        all_of(without(OWN), edited(TOKENIZER, chat_template="of the tokenizer")),
        without(OWN),
        lambda model: additional(model, "tool_use"),
    ],
    ids=["jinja", "processor", "json", "both", "json alone", "tokenizer", "none", "additional"],
)
def test_a_template_has_precedence_as_in_transformers(model: Path, change: Change) -> None:
    change(model)
    own, found = stock(model), load_processor(str(model), None)
    named = isinstance(own.chat_template, dict)
    assert found.chat_template == (own.chat_template["default"] if named else own.chat_template)
    if found.chat_template is not None:
        asked = CONVERSATIONS["image and text"]
        assert found.render(asked, add_generation_prompt=False) == own.apply_chat_template(asked)


def additional(model: Path, name: str) -> None:
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / f"{name}.jinja").write_text("for tools")


@pytest.mark.parametrize("kind", ["list", "dict"])
@pytest.mark.parametrize("file", [PROCESSOR, "chat_template.json"])
def test_the_default_of_named_templates_is_taken(model: Path, file: str, kind: str) -> None:
    named = {"tool_use": "no", "default": (model / OWN).read_text()}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    without(OWN)(model)
    edited(file, chat_template=named if kind == "dict" else listed)(model)
    assert load_processor(str(model), None).chat_template == named["default"]


def test_without_a_default_there_is_no_template(model: Path) -> None:
    without(OWN)(model)
    additional(model, "tool_use")
    with pytest.raises(ConfigError, match=r"has no chat template; add chat_template\.jinja to it"):
        loading.load_metadata(str(model), dtype="float32")


@pytest.mark.parametrize(
    ("change", "token"),
    [
        (lambda model: None, "<image>"),
        (edited(PROCESSOR, image_token="<pad>"), "<image>"),
        (
            all_of(
                edited(TOKENIZER, image_token=None),
                edited(PROCESSOR, image_token="<pad>"),
            ),
            "<pad>",
        ),
        (
            all_of(edited(TOKENIZER, image_token=None), edited(PROCESSOR, image_token=None)),
            "<image>",
        ),
        (
            edited(TOKENIZER, image_token=None, extra_special_tokens={"image_token": "<pad>"}),
            "<pad>",
        ),
    ],
    ids=["both", "tokenizer first", "processor's", "neither", "extra token"],
)
def test_the_tokenizer_s_name_of_the_image_token_has_precedence(
    model: Path, change: Change, token: str
) -> None:
    change(model)
    found, wanted = load_processor(str(model), None), stock(model)
    assert (found.image_token, found.image_token_id) == (token, {"<image>": 3, "<pad>": 2}[token])
    assert (found.image_token, found.image_token_id) == (wanted.image_token, wanted.image_token_id)


def test_a_tokenizer_without_the_image_token_is_refused(model: Path) -> None:
    rewrite(model / TOKENIZER, image_token="<picture>")
    data = json.loads((model / "tokenizer.json").read_text())
    data["added_tokens"] = [one for one in data["added_tokens"] if one["content"] != "<image>"]
    (model / "tokenizer.json").write_text(json.dumps(data))
    rewrite(model / TOKENIZER, image_token=None)
    rewrite(model / PROCESSOR, image_token="<picture>")
    with pytest.raises(ConfigError, match="has no token <picture>, which stands for an image"):
        load_processor(str(model), None)


@pytest.mark.parametrize(
    "made",
    [
        lambda model: load_processor(str(model), None),
        lambda model: Processor.from_transformers(stock(model)),
    ],
    ids=["loaded", "from transformers"],
)
def test_its_parts_are_those_of_transformers(
    model: Path, made: Callable[[Path], Processor]
) -> None:
    found, wanted = made(model), stock(model)
    assert type(found.image_processor) is type(wanted.image_processor)
    assert found.image_processor.to_dict() == wanted.image_processor.to_dict()
    assert type(found.tokenizer) is type(wanted.tokenizer)
    assert found.tokenizer.get_vocab() == wanted.tokenizer.get_vocab()
    assert found.tokenizer("a < b </s>").input_ids == wanted.tokenizer("a < b </s>").input_ids
    assert found.settings == {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
    }


def test_the_files_of_2024_are_read(model: Path) -> None:
    """An image processor in a file of its own, and no processor_config.json."""
    wanted = load_processor(str(model), None)
    images = json.loads((model / PROCESSOR).read_text())["image_processor"]
    holding("preprocessor_config.json", json.dumps(images).encode())(model)
    without(PROCESSOR)(model)
    found = load_processor(str(model), None)
    assert found.image_processor.to_dict() == wanted.image_processor.to_dict()
    assert (found.chat_template, found.settings) == (wanted.chat_template, {})


@pytest.mark.parametrize("layout", ["today", "2025"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_processors_with_videos_are_loaded_without_them(
    tmp_path: Path, kind: str, layout: str
) -> None:
    """Transformers' own needs torchvision, and SmolVLM's num2words as well."""
    model = write_files(kind, tmp_path / "model", layout=layout)
    found, wanted = load_processor(str(model), None), stock_processor(kind)
    assert (found.image_token, found.image_token_id) == (wanted.image_token, wanted.image_token_id)
    assert type(found.image_processor) is type(wanted.image_processor)
    assert found.image_processor.to_dict() | {"do_pad": None} == (
        wanted.image_processor.to_dict() | {"do_pad": None}  # written as null in 2025
    )
    assert found.settings.items() >= SETTINGS[kind].items()
    assert found.settings.keys().isdisjoint({"image_processor", "video_processor"})
    for messages in CONVERSATIONS.values():
        # Past SmolVLM's own method, which asks its video processor for settings.
        prompt = ProcessorMixin.apply_chat_template(wanted, messages, add_generation_prompt=True)
        assert found.render(messages) == prompt
        assert found.tokenizer(prompt).input_ids == wanted.tokenizer(prompt).input_ids
    assert ChatPrompt(found).encode("What is it?", 2).count(found.image_token_id) == 2


def test_a_hub_id_is_read_at_its_revision(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    there = tmp_path / "hub" / "models--some--model"
    (there / "refs").mkdir(parents=True)
    for name, commit in (("main", "c" * 40), ("older", "d" * 40)):
        (there / "refs" / name).write_text(commit)
        (copy_of(model, there / "snapshots" / commit) / OWN).write_text(f"{name}: <image>")
    for revision in ("main", "older", "d" * 40):
        name = "older" if revision == "d" * 40 else revision
        assert load_processor("some/model", revision).chat_template == f"{name}: <image>"


def test_images_are_always_resized_by_pillow(
    tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torchvision transformers would take another processor, which resizes otherwise."""
    asked: list[object] = []
    real = AutoImageProcessor.from_pretrained

    def noted(path: str, **named: object) -> object:
        asked.append(named["backend"])
        return real(path, **named)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", noted)
    processor = loading.load_metadata(str(tiny_paths["vicuna"]), dtype="float32").family.processor
    assert asked == ["pil"]
    assert type(processor.image_processor).__name__ == "LlavaNextImageProcessorPil"

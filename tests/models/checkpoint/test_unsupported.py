"""Models that are not supported are refused by name, with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.consistency import MODEL_TYPES, check_directory
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES
from gc2ray.models.checkpoint.unsupported import CONVERSIONS, REMOTE, UNSUPPORTED
from tests.support.commands import run_command
from tests.support.model_files import CONFIG, edited
from tests.support.rows import job_data, write_rows


def refusal(model: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_directory(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mllama", "which reads images by cross-attention: they have no tokens in the prompt"),
        (
            "qwen2_5_vl",
            "whose positions have three dimensions, and which sees",
        ),
        ("llava", "which sees an image as one view: there are no crops to choose tokens from"),
        ("deepseek_ocr2", "whose image tokens are learned queries"),
        ("idefics2", r"learned queries.*its successor is HuggingFaceM4/Idefics3-8B-Llama3"),
        ("gemma3", "whose image tokens attend to later ones, too"),
        ("granite4_vision", "which adds image features in several layers"),
        ("aya_vision", "which is not supported yet"),
        ("minicpmv", "whose code comes with its files, and is never run"),
    ],
)
def test_a_model_is_refused_with_its_reason(model: Path, kind: str, reason: str) -> None:
    edited(CONFIG, model_type=kind)(model)
    article = "an" if kind[0] in "aeiou" else "a"
    message = refusal(model)
    assert re.search(f": it is {article} {kind} model, .*{reason}", message)
    assert message.endswith(f"; supported: {', '.join(MODEL_TYPES)}")


def test_keys_like_those_of_llava_s_authors_do_not_hide_the_reason(model: Path) -> None:
    edited(CONFIG, model_type="gemma3", mm_tokens_per_image=256)(model)
    assert "is a gemma3 model, whose image tokens attend" in refusal(model)


@pytest.mark.parametrize(
    ("kind", "others", "named"),
    [
        ("internvl_chat", {}, "OpenGVLab/InternVL3-8B-hf"),
        ("llava_qwen", {"mm_vision_tower": "x"}, "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("llava_llama", {"mm_vision_tower": "x"}, "https://huggingface.co/llava-hf"),
        ("llava_mistral", {"architectures": ["LlavaMistralForCausalLM"]}, "co/llava-hf"),
    ],
)
def test_the_layouts_of_authors_are_refused_with_what_to_name(
    model: Path, kind: str, others: dict[str, object], named: str
) -> None:
    edited(CONFIG, model_type=kind, **others)(model)
    message = refusal(model)
    assert f'authors (model_type "{kind}"), which transformers does not load; name' in message
    assert named in message


def test_names_are_those_of_transformers_and_no_supported_ones() -> None:
    """A slip in a name would leave a model without its reason."""
    remote = {kind for kind, reason in UNSUPPORTED.items() if reason == REMOTE}
    assert {*UNSUPPORTED} - remote - {*CONFIG_MAPPING_NAMES} == set()
    assert remote.isdisjoint(CONFIG_MAPPING_NAMES)
    assert {*FAMILY_RULES}.isdisjoint({*UNSUPPORTED, *CONVERSIONS})


def test_the_command_line_refuses_it_before_anything_starts(model: Path, tmp_path: Path) -> None:
    edited(CONFIG, model_type="mllama")(model)
    source = write_rows(tmp_path / "rows.parquet", 4)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(job_data(model, source, tmp_path / "out")))
    caught = run_command("estimate", job)
    assert (caught.exit_code, "by cross-attention" in caught.stderr) == (2, True)

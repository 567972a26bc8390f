"""`gc2ray models`: the table of known models says what the code behind it does."""

from __future__ import annotations

import json
import re

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from typer.testing import CliRunner

import gc2ray
from gc2ray.cli.app import app
from gc2ray.models import llama, registry
from gc2ray.models.checkpoint import known_models
from gc2ray.models.checkpoint.consistency import MODEL_TYPES
from gc2ray.models.checkpoint.family_rules import FAMILY_RULES
from gc2ray.models.checkpoint.known_models import KNOWN_MODELS, NATIVE_LANGUAGES, KnownModel
from gc2ray.models.checkpoint.unsupported import CONVERSIONS, UNSUPPORTED
from tests.support.commands import run_command

BY_TYPE = {model.model_type for model in KNOWN_MODELS}
LINES = [model.name for model in KNOWN_MODELS]


def printed(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["models", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_family_is_in_the_table() -> None:
    assert {*registry.FAMILIES} == BY_TYPE, "add a line to KNOWN_MODELS"
    assert {*FAMILY_RULES} == BY_TYPE
    assert BY_TYPE.isdisjoint({*UNSUPPORTED, *CONVERSIONS})


def test_a_family_that_is_not_listed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    new = {**registry.FAMILIES, "new": registry.FAMILIES["llava_next"]}
    monkeypatch.setattr(registry, "FAMILIES", new)
    with pytest.raises(AssertionError, match="add a line to KNOWN_MODELS"):
        test_every_family_is_in_the_table()


def test_what_the_native_decoder_runs() -> None:
    assert NATIVE_LANGUAGES == llama.MODEL_TYPES
    assert {model.name for model in KNOWN_MODELS if model.decoder != "native"} == {
        "InternVL3.5 MoE"
    }


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=LINES)
def test_towers_and_language_models_are_those_of_transformers(model: KnownModel) -> None:
    assert model.tower in FAMILY_RULES[model.model_type].towers
    assert {model.tower, *model.languages} <= {*CONFIG_MAPPING_NAMES}
    assert model.score in ("class_token", "received")


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=LINES)
def test_checkpoints_are_hub_ids(model: KnownModel) -> None:
    assert model.checkpoints
    for checkpoints in model.checkpoints:
        assert len(set(checkpoints.hub_ids)) == len(checkpoints.sizes) > 0
        assert all(re.fullmatch(r"[\w-]+/[\w.-]+", name) for name in checkpoints.hub_ids)
        assert checkpoints.licence
    assert all(re.fullmatch(r"[\d.]+[MB](-A\d+B)?", size) for size in model.sizes)


def test_every_tower_of_a_family_is_in_the_table() -> None:
    """But for those that transformers 4 and 5 name differently, of which one is enough."""
    for kind, rules in FAMILY_RULES.items():
        listed = {model.tower for model in KNOWN_MODELS if model.model_type == kind}
        strategies = {rules.towers[tower] for tower in listed}
        assert strategies == {*rules.towers.values()}, kind


def test_the_list_fits_a_terminal_of_80_columns() -> None:
    text = printed()
    assert max(map(len, text.splitlines())) <= 80
    for model in KNOWN_MODELS:
        settings = "measured" if model.measured else "not measured"
        cells = (model.model_type, model.name, model.decoder, model.score, settings)
        assert re.search(" +│ ".join(map(re.escape, cells)), text)
        for checkpoints in model.checkpoints:
            cells = (checkpoints.pattern, checkpoints.licence)
            assert re.search(" +│ ".join(map(re.escape, cells)), text)
    assert text.count("(unverified)") == 2
    assert "Not supported yet: aya_vision, cohere2_vision, lfm2_vl" in text
    others = len(UNSUPPORTED) + len(CONVERSIONS) - 3
    assert f"{others} other model types are refused" in " ".join(text.split())


def test_only_models_that_can_be_loaded_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {model.model_type for model in gc2ray.supported_models().models} == {*MODEL_TYPES}
    monkeypatch.setattr(known_models, "MODEL_TYPES", ("internvl",))
    names = [model.name for model in gc2ray.supported_models().models]
    assert names == ["InternVL3", "InternVL3.5", "InternVL3.5 MoE"]


def test_a_single_model_type() -> None:
    text = printed("llava_next")
    assert "│ measured " in text
    assert "│ not measured " in text
    assert "Not supported yet" not in text
    refused = run_command("models", "mllama")
    assert (refused.exit_code, refused.stdout) == (
        1,
        "mllama is not supported: it reads images by cross-attention: "
        "they have no tokens in the prompt\n",
    )
    assert "OpenGVLab/InternVL3-8B-hf" in run_command("models", "internvl_chat").stdout


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("lava_next", "did you mean 'llava_next'?"),
        ("SmolVLM", "did you mean 'smolvlm'?"),
        ("git", "lists those that"),
        ("OpenGVLab/InternVL3-8B-hf", "give the model_type in its config.json"),
    ],
)
def test_a_model_type_that_is_not_known(kind: str, hint: str) -> None:
    result = run_command("models", kind)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert hint in result.stderr
    with pytest.raises(gc2ray.ConfigError, match=r"^MODEL_TYPE: "):
        gc2ray.supported_models(kind)


def test_json() -> None:
    document = json.loads(printed("--json"))
    assert document["not_yet"] == ["aya_vision", "cohere2_vision", "lfm2_vl"]
    assert document["refused"]["mllama"].startswith("it reads")
    next_, granite = (m for m in document["models"] if m["model_type"] == "llava_next")
    assert (next_["measured"], next_["decoder"], next_["default_score"]) == (
        True, "native", "class_token",
    )  # fmt: skip
    assert (granite["measured"], granite["default_score"]) == (False, "received")
    assert next_["unverified_checkpoints"][0] == {
        "hub_ids": ["llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-vicuna-13b-hf"],
        "sizes": ["7b", "13b"],
        "licence": "Llama 2",
    }

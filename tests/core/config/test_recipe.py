"""What identifies a recipe, and how two of them differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from gc2ray.core.config.job import parse_job
from gc2ray.core.config.recipe import parse_recipe, recipe_difference
from gc2ray.core.errors import ConfigError
from tests.support.configs import config_error, job_data_with
from tests.support.rows import job_data


def test_a_local_model_must_be_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path):
        model = parse_job(job_data_with("recipe.model.path", str(path))).recipe.model
        with pytest.raises(ConfigError, match=r"recipe\.model\.path: there is no model in"):
            model.check()
    (tmp_path / "config.json").write_text("{}")
    model.check()


@pytest.mark.parametrize(
    "path",
    [
        "somebody/some-model",
        "s3://bucket/model",
        "file:///nowhere",
        "zip://a::./b.zip",
        "/a::zip://b",
    ],
)
def test_a_model_of_the_hub_or_behind_a_url_is_not_checked(path: str) -> None:
    model = parse_job(job_data_with("recipe.model.path", path)).recipe.model
    model.check()
    assert not model.is_local
    assert model.is_url == ("://" in path)


def test_unsupported_settings_are_refused_by_name() -> None:
    for key in ("adapter", "quantization"):
        message = config_error(f"recipe.model.{key}", "x")
        assert message == f"recipe.model.{key}: not supported yet; leave it null"


CHANGES: dict[str, object] = {
    "model.path": "other",
    "model.revision": "main",
    "model.dtype": "float16",
    "compression.method": "random",
    "compression.retention": 0.26,
    "compression.temperature": 9,
    "compression.positions": "original",
    "compression.newlines": "none",
    "compression.markers": "kept_views",
    "compression.score": "received",
    "compression.budget": "row",
    "compression.allow_code": True,
    "generation.max_new_tokens": 9,
    "generation.temperature": 0.1,
    "generation.top_p": 0.9,
    "generation.seed": 1,
    "generation.stop_token_ids": [7],
    "generation.max_repeats": 4,
    "generation.repetition_penalty": 1.2,
    "generation.ignore_model_rules": ["no_repeat_ngram_size"],
    "audit.share": 0.01,
    "audit.escalate": [0.5],
    "audit.min_similarity": 0.9,
    "input.uri": "elsewhere",
    "input.image": "picture",
    "input.prompt": {"column": "prompt"},
    "input.keep": ["id"],
    "input.image_roots": ["/images"],
    "input.max_image_bytes": 5,
    "input.max_image_pixels": 5,
}
"""Every recipe setting that has a choice, and another value of it."""
ONE_CHOICE = {
    "compression.source_sha256",  # where the method is gc2ray's; see test_method_source.py
    "model.adapter",
    "model.quantization",
}


def test_the_changes_cover_every_setting() -> None:
    recipe = parse_job(job_data("model", "in", "out")).recipe
    settings = {f"{a}.{b}" for a, values in recipe.model_dump().items() for b in values}
    assert settings == {*CHANGES, *ONE_CHOICE}


@pytest.mark.parametrize("path", CHANGES)
def test_every_setting_changes_the_fingerprint_and_the_difference(path: str) -> None:
    found = job_data_with(f"recipe.{path}", CHANGES[path])
    if path == "audit.escalate":  # only what is audited can be answered anew
        found["recipe"]["audit"]["share"] = 0.5
    before = job_data_with("recipe.audit.share", 0.5 if path == "audit.escalate" else 0.0)
    stored, yours = parse_job(before).recipe, parse_job(found).recipe
    assert stored.fingerprint() != yours.fingerprint()
    lines = recipe_difference(stored, yours)
    assert lines
    assert all(line.startswith(f"recipe.{path}") for line in lines)


def test_the_cluster_and_the_output_do_not_change_the_fingerprint() -> None:
    a = parse_job(job_data("model", "in", "out"))
    data = job_data("model", "in", "elsewhere")
    data["cluster"] = {"workers": 7, "kv_tokens": 9, "views_per_batch": 1, "tries": 9}
    b = parse_job(data)
    assert a.recipe.fingerprint() == b.recipe.fingerprint()
    assert recipe_difference(a.recipe, b.recipe) == []


def test_explicit_defaults_are_the_same_recipe() -> None:
    data = job_data_with("recipe.compression.temperature", 10)
    data["recipe"]["input"]["keep"] = []
    recipe = parse_job(job_data("model", "in", "out")).recipe
    assert parse_job(data).recipe.fingerprint() == recipe.fingerprint()


def test_the_difference_is_readable() -> None:
    stored = parse_job(job_data("model", "in", "out")).recipe
    data = job_data_with("recipe.compression.retention", 0.5)
    data["recipe"]["input"]["prompt"] = {"column": "question"}
    assert recipe_difference(stored, parse_job(data).recipe) == [
        "recipe.compression.retention: 0.25 (stored) -> 0.5 (yours)",
        "recipe.input.prompt.column: None (stored) -> 'question' (yours)",
        "recipe.input.prompt.constant: 'What is in the picture?' (stored) -> None (yours)",
    ]


def test_a_recipe_survives_a_json_round_trip() -> None:
    recipe = parse_job(job_data_with("recipe.input.keep", ["id"])).recipe
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_an_explicit_float_default_is_the_same_recipe() -> None:
    """So a setting that a later version adds leaves old recipes what they are."""
    plain = parse_job(job_data("model", "in", "out")).recipe
    spelled = parse_job(job_data_with("recipe.compression.temperature", 10.0)).recipe
    assert plain.fingerprint() == spelled.fingerprint()

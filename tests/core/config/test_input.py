"""Prompts, kept columns and image limits of an input."""

from __future__ import annotations

import pytest
from PIL import Image

from gc2ray.core.config.input import MAX_PIXELS, ImageLimits
from gc2ray.core.config.job import parse_job
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import ANSWER_COLUMNS
from tests.support.configs import config_error, job_data_with


def test_image_limits_are_checked_before_anything_starts() -> None:
    assert "recipe.input.max_image_pixels" in config_error("recipe.input.max_image_pixels", 10**9)
    assert "recipe.input.image_roots" in config_error("recipe.input.image_roots", [""])


@pytest.mark.parametrize(
    "prompt", [{}, {"column": "a", "constant": "b"}, {"template": "{a}", "column": "a"}]
)
def test_a_prompt_is_exactly_one_of_three(prompt: dict[str, str]) -> None:
    message = config_error("recipe.input.prompt", prompt)
    assert message.startswith(
        "recipe.input.prompt: set exactly one of column, template, constant; got "
    )


@pytest.mark.parametrize(
    "template",
    ["{x.__class__}", "{x[0]}", "{}", "{0}", "{x!r}", "{x:>100000000}", "{x:{y}}", "{a b}"],
)
def test_a_template_takes_plain_columns_only(template: str) -> None:
    message = config_error("recipe.input.prompt", {"template": template})
    assert "only plain column names are allowed" in message


@pytest.mark.parametrize("template", ["{x", "x}"])
def test_a_broken_template_is_refused(template: str) -> None:
    assert config_error("recipe.input.prompt", {"template": template}).startswith(
        "recipe.input.prompt:"
    )


@pytest.mark.parametrize("column", sorted(ANSWER_COLUMNS))
def test_a_kept_column_may_not_hide_an_answer_column(column: str) -> None:
    message = config_error("recipe.input.keep", ["id", column])
    assert message.startswith(f"recipe.input.keep: '{column}' is a column of the answers; write ")


@pytest.mark.parametrize(
    "keep", [["id", "id"], ["id", {"x": "id"}], [{"x": "a"}, {"y": "a"}]], ids=str
)
def test_a_kept_column_is_named_once(keep: list[object]) -> None:
    assert "recipe.input.keep: a column is named twice" in config_error("recipe.input.keep", keep)


@pytest.mark.parametrize(
    ("kept", "reported"),
    [
        ({"x": "answer"}, "'answer' is a column of the answers; write it under another name"),
        ({"a": "b", "c": "d"}, "a renamed column is written {column: name}, each by itself"),
        ({}, "a renamed column is written {column: name}, each by itself"),
        ({"a": 1}, "recipe.input.keep"),
        (1, "recipe.input.keep"),
    ],
    ids=str,
)
def test_an_invalid_renaming_is_refused(kept: object, reported: str) -> None:
    assert reported in config_error("recipe.input.keep", ["id", kept])


def test_a_kept_column_may_be_renamed() -> None:
    """Which is written into the recipe; that of one that renames nothing stays what it was."""
    keep = ["id", {"answer": "reference"}, {"answer": "again"}]
    recipe = parse_job(job_data_with("recipe.input.keep", keep)).recipe
    assert recipe.input.kept() == {"id": "id", "reference": "answer", "again": "answer"}
    assert recipe.input.columns() == ("image", "id", "answer")
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")).fingerprint() == recipe.fingerprint()
    plain = parse_job(job_data_with("recipe.input.keep", ["id", "answer_"])).recipe
    assert '"keep":["id","answer_"]' in plain.model_dump_json(exclude_defaults=True)


def test_an_empty_template_is_refused() -> None:
    for template in ("", " \n"):
        assert "the template is empty" in config_error(
            "recipe.input.prompt", {"template": template}
        )


def test_columns_are_read_once_each() -> None:
    data = job_data_with("recipe.input.prompt", {"template": "{a} {b} {a}"})
    data["recipe"]["input"]["keep"] = ["b", "image", "id"]
    assert parse_job(data).recipe.input.columns() == ("image", "a", "b", "id")


def test_an_image_root_that_would_be_read_as_another_is_refused() -> None:
    assert "did you mean 's3://b/x'?" in config_error(
        "recipe.input.image_roots", ["/ok", "s3:/b/x"]
    )


def test_the_pixel_limit_stays_below_pillows_warning() -> None:
    assert MAX_PIXELS <= Image.MAX_IMAGE_PIXELS
    with pytest.raises(ConfigError, match="max_image_pixels"):
        ImageLimits(max_pixels=Image.MAX_IMAGE_PIXELS + 1)
    with pytest.raises(ConfigError, match="max_image_bytes"):
        ImageLimits(max_bytes=0)


@pytest.mark.parametrize("root", ["", "simplecache::s3://bucket", "a\nb"])
def test_bad_root_is_a_configuration_error(root: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.input\.image_roots"):
        ImageLimits(roots=(root,))

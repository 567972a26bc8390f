"""Jobs that workers answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import parse_recipe
from tests.support.rows import make_job, write_rows


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Twenty rows in two files."""
    write_rows(tmp_path / "in" / "a.parquet", 12, row_group=5)
    write_rows(tmp_path / "in" / "b.parquet", 8, row_group=5)
    return make_job(
        "unused",
        tmp_path / "in",
        tmp_path / "out",
        input__keep=["id"],
        input__prompt={"column": "prompt"},
    )


@pytest.fixture
def multi_prompt_job(job: Job) -> Job:
    """The same rows with lists of prompts."""
    recipe = job.recipe.model_dump(mode="json")
    recipe["input"]["prompt"] = {"column": "prompts"}
    return job.model_copy(update={"recipe": parse_recipe(recipe)})

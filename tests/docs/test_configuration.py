"""The page of settings says what the models say."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from gc2ray.core.config.job import Job
from gc2ray.core.config.yaml_models import flattened
from jobs import docs_configuration
from jobs.docs_configuration import PAGE, render, settings


class Inner(BaseModel):
    """A group.

    Attributes:
        mode: Which one; None is a | b.
        sizes: Several,
            over two lines.
    """

    mode: Literal["a", "b"] | None = None
    sizes: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    memory: int = Field(default=2 << 20, ge=1)
    later: None = None


class Outer(BaseModel):
    """All of it."""

    name: str
    inner: Inner | int


def test_the_page_is_what_the_generator_makes() -> None:
    made = render()
    assert PAGE.read_text(encoding="utf-8") == made, "run `python -m jobs.docs_configuration`"


def test_every_setting_of_a_job_is_on_the_page() -> None:
    written_out = {
        "output": "out",
        "recipe": {
            "model": {"path": "model"},
            "input": {"uri": "in", "prompt": {"constant": "Why?"}},
        },
        "cluster": {"workers": {"min": 1, "max": 2}},
    }
    job = Job.model_validate(written_out)
    not_yet = {"recipe.model.adapter", "recipe.model.quantization"}
    names = {name for name, _ in flattened(job.model_dump())} - not_yet
    assert len(names) > 40
    assert names <= {name for name, _ in settings()}
    assert [name for name in names if f"| `{name}` |" not in PAGE.read_text(encoding="utf-8")] == []


def test_types_defaults_and_meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs_configuration, "Job", Outer)
    lines = [line for line in render().splitlines() if line.startswith(("| `", "## "))]
    assert lines == [
        "## Top level",
        "| `name` | text | required |  |",
        "| `inner` | `{mode, sizes, memory, later}` or whole number | required |  |",
        "## `inner`",
        "| `inner.mode` | `a` or `b` or null | `null` | Which one; null is a \\| b. |",
        "| `inner.sizes` | list of numbers > 0, ≤ 1 | `[]` | Several, over two lines. |",
        "| `inner.memory` | whole number ≥ 1 | `2097152` (2 MiB) |  |",
    ]

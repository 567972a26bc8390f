"""Help, messages, docstrings and templates are plain English, and settings are explained."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gc2ray.cli.app import app
from jobs.docs_configuration import settings
from tests.docs.test_words import offences

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "gc2ray").rglob("*.py"))
TEMPLATES = sorted((ROOT / "gc2ray").rglob("*.j2"))
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def texts(source: str) -> Iterator[tuple[str, int]]:
    """String constants of a module with a blank in them, each with its line; others are names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value, node.lineno


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_strings_and_docstrings_are_plain_english(path: Path) -> None:
    found = texts(path.read_text(encoding="utf-8"))
    assert [message for text, line in found for message in offences(text, place(path), line)] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=place)
def test_templates_are_plain_english(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"), place(path))) == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_plain_english(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    assert list(offences(shown.output, f"gc2ray {command} --help")) == []


def test_every_string_of_a_module_is_checked() -> None:
    source = 'def f(x):\n    """It goes on."""\n    raise ValueError(f"{x} is answered anew")\n'
    found = [message for text, line in texts(source) for message in offences(text, "m", line)]
    assert [message.partition(";")[0] for message in found] == ["m:2: 'goes on'", "m:3: 'anew'"]


def test_every_setting_has_a_description() -> None:
    assert [name for name, meaning in settings() if not meaning] == []

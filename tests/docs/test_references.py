"""What pages name is there: files of the repository, and names of the package."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.test_words import PAGES

ROOT = Path(__file__).parents[2]
PLUG_INS = "gc2ray.methods"
"""A group of entry points, and no module."""
FILE = re.compile(r"(?<![\w/.-])(?:gc2ray|jobs|tests|docs|configs|examples)/[\w./-]*\w")
NAME = re.compile(r"(?<![\w./-])gc2ray(?:\.[A-Za-z]\w*)+")
OLD = re.compile(r"git archive .*")
"""Files of an earlier commit."""


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:depth]))
        except ModuleNotFoundError:
            continue
        for part in parts[depth:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def missing(text: str) -> Iterator[str]:
    """Files and names in a page that are not there."""
    text = OLD.sub("", text)
    yield from (path for path in FILE.findall(text) if not (ROOT / path).exists())
    names = {*NAME.findall(text)} - {PLUG_INS}
    yield from (name for name in sorted(names) if not is_there(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_on_a_page_exist(page: Path) -> None:
    assert list(missing(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text", ["see `gc2ray/families/llava.py`", "`gc2ray.pictures`", "`gc2ray.core.errors.Nothing`"]
)
def test_a_missing_file_or_name_is_found(text: str) -> None:
    assert len(list(missing(text))) == 1

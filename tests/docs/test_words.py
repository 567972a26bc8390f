"""Documentation, help and messages are plain English: none of the words in `words.txt`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = Path(__file__).with_name("words.txt")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"configuration.md"}
"""Made of docstrings, which are looked at where they stand."""
CODE = re.compile(r"^```.*?^```|`[^`\n]*`|\]\([^)\n]*\)", re.DOTALL | re.MULTILINE)
"""Code, and addresses of links: names, not words."""


def read_words(text: str) -> list[tuple[re.Pattern[str], str]]:
    """The expressions of a list, and what to write in place of what they find."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.rsplit(" | ", 1) for line in lines]
    return [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in pairs]


PATTERNS = read_words(WORDS.read_text(encoding="utf-8"))


def offences(text: str, place: str, first_line: int = 1) -> Iterator[str]:
    """The words of the list that a text has, each with its line and what to write in its place."""
    flat = text.replace("\n", " ")  # of the same length: phrases go over the ends of lines
    for pattern, instead in PATTERNS:
        for found in pattern.finditer(flat):
            line = first_line + text.count("\n", 0, found.start())
            yield f"{place}:{line}: {found.group()!r}; write: {instead}"


def prose(markdown: str) -> str:
    """A page with blanks in place of code, line by line as it was."""
    return CODE.sub(lambda code: re.sub(r"[^\n]", " ", code.group()), markdown)


def test_the_list_has_no_line_without_a_suggestion() -> None:
    assert len(PATTERNS) > 30
    assert all(instead.strip() for _, instead in PATTERNS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain_english(page: Path) -> None:
    if page.name not in GENERATED:
        assert list(offences(prose(page.read_text(encoding="utf-8")), page.name)) == []


@pytest.mark.parametrize(
    "text",
    [
        "a row is answered anew", "run again to go\non", "of which the user is told", "three rungs",
        "rows that wait are hungry", "The pace of a run", "the offer is low", "a commander",
        "of a later generation", "it asks nobody for anything", "the shard is buried",
    ],
)  # fmt: skip
def test_private_words_are_found(text: str) -> None:
    assert len(list(offences(text, "page"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Global Compression Commander", "gc2ray offers two commands", "text generation",
        "the generation config", "a command line", "pages", "released", "wrong", "in this way",
        "a dead letter is a record", "commands start without torch", "space", "there is no file",
    ],
)  # fmt: skip
def test_plain_words_are_left_alone(text: str) -> None:
    assert list(offences(text, "page")) == []


def test_lines_are_counted_and_code_is_left_out() -> None:
    page = "# Page\n\n`rung` is a name.\n\n```\nanew\n```\nIt goes\non. [x](rung.md)\n"
    assert list(offences(prose(page), "page")) == ["page:8: 'goes on'; write: continue, resume"]

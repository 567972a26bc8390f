"""The documentation builds without a warning, and its pages fetch nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
"""Attributes whose addresses a browser fetches by itself."""
OUTSIDE = re.compile(r"(?:https?:)?//")
README_LINES, README_WORDS = 140, 1500


class Loads(HTMLParser):
    """Addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name == LOADED.get(tag)]


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.addresses


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        found = loads(page.read_text(encoding="utf-8"))
        assert len(found) > 3
        assert [address for address in found if OUTSIDE.match(address)] == [], page.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text) == [], sheet.name


def test_a_load_from_the_network_is_found() -> None:
    page = '<link href="https://fonts.example/a.css"><script src="//cdn.example/b.js"></script>'
    assert all(OUTSIDE.match(address) for address in loads(page))
    assert len(loads(page)) == 2


def test_the_front_page_is_the_readme(site: Path) -> None:
    front = (site / "index.html").read_text(encoding="utf-8")
    assert "gc2ray answers every image and prompt" in front
    for path in re.findall(r"\]\(docs/([\w-]+)\.md\)", (ROOT / "README.md").read_text()):
        assert f'href="{path}.html"' in front
    assert (site / "kept.png").exists()
    assert 'src="kept.png"' in front


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    assert len(text.split()) <= README_WORDS


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if f"](docs/{page})" not in text} == set()

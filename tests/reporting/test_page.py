"""The report opened in a real browser: nothing is asked of anybody, nothing runs, all is drawn."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gc2ray.reporting.page import RowImages, report
from tests.reporting.test_report import a_run, run_with_markup, small_token_map, written_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENSHOTS = os.environ.get("GC2RAY_SCREENSHOTS")
"""Where to leave pictures for people to look at; nowhere as a rule."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing = f"no browser here ({', '.join(BROWSERS)})"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root, as continuous integration often is, has no sandbox; the page is our own.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=found, args=arguments)
        yield chromium
        chromium.close()


class Opened:
    """A page as it was seen: what it said, what it asked for."""

    def __init__(self, browser: Any, file: Path, *, scheme: str = "light", width: int = 1200):
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.append(request.url))
        self.page.goto(file.as_uri())
        if SCREENSHOTS:
            name = f"{file.parent.name}-{scheme}-{width}.png"
            self.page.screenshot(path=str(Path(SCREENSHOTS) / name), full_page=True)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    summary, _ = written_report(a_run(folder / "run"))
    pictures = [
        RowImages.from_token_maps([small_token_map(f"d/b.parquet#{row}: what?")])
        for row in range(2)
    ]
    found = report([summary], {summary.output: pictures})
    file = folder / "report.html"
    file.write_text(found.html)
    return file


LOOKS = [("light", 1200), ("dark", 1200), ("light", 390), ("dark", 390)]


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_the_page_opens_without_errors_or_requests(
    browser: Any, page_file: Path, scheme: str, width: int
) -> None:
    opened = Opened(browser, page_file, scheme=scheme, width=width)
    assert opened.said == []
    assert opened.asked == [page_file.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_drawing_is_there_and_fits(
    browser: Any, page_file: Path, scheme: str, width: int
) -> None:
    page = Opened(browser, page_file, scheme=scheme, width=width).page
    captions = page.locator(".charts figcaption").all_inner_texts()
    assert captions == [
        "Visual tokens by view", "Actual retention", "Operations by stage",
        "Busy seconds by stage", "Throughput", "Device-seconds by use",
    ]  # fmt: skip
    drawings = page.locator("figure svg")
    assert drawings.count() == len(captions)
    for index in range(len(captions)):
        box = drawings.nth(index).bounding_box()
        assert box["width"] > 250
        assert box["height"] > 90
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert drawings.nth(index).locator("path").count() > 5
        assert drawings.nth(index).locator("text").count() > 3


CUT = """() => [...document.querySelectorAll(".scroll")]
  .filter(it => it.scrollWidth > it.clientWidth).map(it => it.innerText)"""


@pytest.mark.parametrize("width", [1200, 600, 390])
def test_no_table_is_cut(browser: Any, page_file: Path, width: int) -> None:
    assert Opened(browser, page_file, scheme="light", width=width).page.evaluate(CUT) == []


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_rows_with_token_maps_are_shown(
    browser: Any, page_file: Path, scheme: str, width: int
) -> None:
    page = Opened(browser, page_file, scheme=scheme, width=width).page
    pictures = page.locator(".row img")
    assert pictures.count() == 8
    for index in range(8):
        assert pictures.nth(index).evaluate("it => it.complete && it.naturalWidth") == 600
        assert pictures.nth(index).get_attribute("alt")
        box = pictures.nth(index).bounding_box()
        assert box["width"] > 200
        assert box["x"] + box["width"] <= width


COLOURS = """() => {
  const lightness = c => { const [r, g, b] = c.match(/\\d+/g).map(Number);
    const f = v => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; };
    return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
  const contrast = (a, b) => { const [x, y] = [lightness(a), lightness(b)].sort((p, q) => q - p);
    return (x + .05) / (y + .05); };
  const panel = getComputedStyle(document.querySelector("figure")).backgroundColor;
  const found = [...document.querySelectorAll("figure svg text")].map(
    t => contrast(getComputedStyle(t).fill, panel));
  const page = getComputedStyle(document.body);
  return { text: Math.min(...found), body: contrast(page.color, page.backgroundColor) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(browser: Any, page_file: Path, scheme: str) -> None:
    """WCAG 2: contrast of 4.5 to 1, of text in drawings, too."""
    found = Opened(browser, page_file, scheme=scheme).page.evaluate(COLOURS)
    assert found["text"] >= 4.5
    assert found["body"] >= 7


def test_an_injected_script_does_nothing(browser: Any, tmp_path: Path) -> None:
    _, found = written_report(run_with_markup(tmp_path / "run"))
    file = tmp_path / "report.html"
    file.write_text(found.html)
    opened = Opened(browser, file)
    assert opened.page.title().startswith("gc2ray report")
    assert opened.said == []
    assert opened.asked == [file.as_uri()]
    assert "<script>" in opened.page.locator("body").inner_text()
    assert opened.page.locator("script").count() == 0


def test_its_own_policy_forbids_scripts(browser: Any, page_file: Path, tmp_path: Path) -> None:
    """Had one got through, it would not run: the second wall behind escaping."""
    file = tmp_path / "report.html"
    page = page_file.read_text().replace(
        "<h1>", '<script>document.title = "taken"</script><img src="https://evil.test/x"><h1>', 1
    )
    file.write_text(page)
    opened = Opened(browser, file)
    assert opened.page.title().startswith("gc2ray report")
    assert any("Content Security Policy" in text for text in opened.said)
    assert opened.refused == ["https://evil.test/x"]

"""What MkDocs asks for while it builds: the pages that lie beside `docs/`, not in it.

`README.md` is the front page and `CONTRIBUTING.md` a page of its own. Their links, and those to
them, are written so that they work in the repository; here they are made to work in the site.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages by their name in the site."""
LINKS = (
    ("](docs/", "]("),
    ('src="docs/', 'src="'),
    ("](../CONTRIBUTING.md", "](contributing.md"),
    ("](CONTRIBUTING.md", "](contributing.md"),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside."""
    for name, source in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Rewrite the links of a page."""
    for here, there in LINKS:
        markdown = markdown.replace(here, there)
    return markdown

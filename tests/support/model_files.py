"""Copies of a model, and changes to its files, one at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG, GENERATION, TOKENIZER, PROCESSOR = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
)
IMAGES = (PROCESSOR, "image_processor")
TEXT, VISION = (CONFIG, "text_config"), (CONFIG, "vision_config")
Change = Callable[[Path], object]


def copy_of(model: Path, to: Path) -> Path:
    return Path(shutil.copytree(model, to))


def rewrite(file: Path, **changes: Any) -> None:
    """Other values in a JSON file; None takes a key out."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edited(file: str, *keys: str, **changes: object) -> Change:
    """Values of a file, or of what `keys` lead to in it, to be changed; None leaves one out."""

    def change(model: Path) -> None:
        data = json.loads((model / file).read_text()) if (model / file).is_file() else {}
        part = data
        for key in keys:
            part = part.setdefault(key, {})
        part.update(changes)
        for name, value in changes.items():
            if value is None:
                del part[name]
        (model / file).write_text(json.dumps(data))

    return change


def without(*files: str) -> Change:
    return lambda model: [(model / file).unlink() for file in files]


def holding(file: str, data: bytes) -> Change:
    return lambda model: (model / file).write_bytes(data)


def all_of(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]

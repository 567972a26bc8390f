"""What fetching a model should bring to a node's disk, and looks at what it brought."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gc2ray.core.config.recipe import ModelConfig
from gc2ray.models.checkpoint.fetch import FetchedModel, fetch_model

WANTED = {
    "config.json",
    "model.safetensors",
    "tokenizer.model",
    "vocab.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
}
UNWANTED = {"pytorch_model.bin", "optimizer.pt", "modeling.py", "README.md", "old/m.safetensors"}


def fetch(path: Path | str, **options: Any) -> FetchedModel:
    return fetch_model(ModelConfig(path=str(path)), jitter_seconds=0, **options)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

"""Tiny checkpoints as they lay on the hub in 2024 and 2025: names of tensors, heads, files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.families import FAMILIES
from tests.support.old_files import (
    Data,
    granite_vision,
    idefics3,
    internvl,
    llava_next,
    llava_onevision,
    smolvlm,
)

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
TOWER_INSIDE = {r"^vision_tower\.": "vision_tower.vision_model."}
"""Before transformers 5, the tower was a model in a model."""
NESTED = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^(vision_tower\.|multi_modal_projector\.|image_newline)": r"model.\1",
}
"""As 4.52 and later named them in memory, and trainers wrote them."""
NESTED_TOWER_INSIDE = {**NESTED, r"^model\.vision_tower\.": "model.vision_tower.vision_model."}
FILES = (
    "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lay on the hub.

    Attributes:
        family: Its name in `FAMILIES`.
        files: Makes the small files of those of today, by name.
        names: Patterns in today's names of tensors, with what stood there.
        tied: Whether the files leave the head out, as it is the text table.
        config: Other values of config.json, at its top level.
        text: Other values of its text_config.
        shards: Files of weights.
        template: File of the chat template.
    """

    family: str
    files: Callable[[Data, Data], Data]
    names: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    config: Data = field(default_factory=dict)
    text: Data = field(default_factory=dict)
    shards: int = 1
    template: str = "chat_template.json"


def build_today(family: str, directory: Path, *, tied: bool = False) -> Path:
    """The tiny checkpoint of a family in today's files, with weights of 16 bits.

    Args:
        family: Its name in `FAMILIES`.
        directory: Where to.
        tied: Whether its head is its text table.
    """
    FAMILIES[family].build(directory)
    tensors = {name: value.half() for name, value in load_file(directory / WEIGHTS).items()}
    if tied:
        tensors = {name: value for name, value in tensors.items() if "lm_head" not in name}
        config = _read(directory / "config.json")
        config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
        _write(directory / "config.json", config)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


def write_old(layout: Layout, today: Path, directory: Path) -> Path:
    """Write a checkpoint of today, made by `build_today`, in an older layout."""
    directory.mkdir(parents=True)
    shutil.copy(today / "tokenizer.json", directory)
    there = {name: _read(today / name) for name in FILES if (today / name).is_file()}
    images = there.get("preprocessor_config.json") or there["processor_config.json"]
    images = images.get("image_processor", images)
    written = layout.files(there["config.json"], images)
    config = written["config.json"]
    config |= layout.config
    config["text_config"] |= layout.text
    text = _template(there)
    is_json = layout.template.endswith(".json")
    written[layout.template] = {"chat_template": text} if is_json else text
    for name, data in written.items():
        _write(directory / name, data)
    _write_weights(layout, load_file(today / WEIGHTS), directory)
    return directory


def _write_weights(layout: Layout, tensors: Tensors, directory: Path) -> None:
    renamed = dict(_renamed(layout.names, tensors))
    if layout.shards == 1:
        save_file(renamed, directory / WEIGHTS, {"format": "pt"})
        return
    index: dict[str, str] = {}
    for shard in range(layout.shards):
        file = f"model-{shard + 1:05}-of-{layout.shards:05}.safetensors"
        part = {name: renamed[name] for name in sorted(renamed)[shard :: layout.shards]}
        save_file(part, directory / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    _write(
        directory / f"{WEIGHTS}.index.json",
        {"metadata": {"total_size": 1}, "weight_map": index},
    )


def _renamed(names: Mapping[str, str], tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tensors.items():
        for pattern, there in names.items():
            name = re.sub(pattern, there, name)
        yield name, value


def _template(files: Mapping[str, Any]) -> str:
    own = files.get("chat_template.json", {}).get("chat_template")
    return str(own or files["chat_template.jinja"])


def _read(path: Path) -> Any:
    return path.read_text() if path.suffix == ".jinja" else json.loads(path.read_text())


def _write(path: Path, data: object) -> None:
    path.write_text(data if isinstance(data, str) else json.dumps(data, indent=2))


LAYOUTS: dict[str, Layout] = {
    "llava-next 7B 2024": Layout("llava_next", llava_next, TOWER_INSIDE, shards=3),
    "llava-next, trained": Layout("llava_next", llava_next, NESTED_TOWER_INSIDE),
    "granite-vision 2025": Layout(
        "granite_vision", granite_vision, TOWER_INSIDE, tied=True, shards=2,
        config={"tie_word_embeddings": True}, text={"tie_word_embeddings": True},
    ),
    "granite-vision, tied inside": Layout(
        "granite_vision", granite_vision, TOWER_INSIDE, tied=True,
        text={"tie_word_embeddings": True},
    ),
    "granite-vision, trained": Layout("granite_vision", granite_vision, NESTED_TOWER_INSIDE),
    "onevision 7B 2024": Layout("llava_onevision", llava_onevision, TOWER_INSIDE, shards=3),
    "onevision 0.5B 2024": Layout(
        "llava_onevision", llava_onevision, TOWER_INSIDE, tied=True,
        text={"tie_word_embeddings": True},
    ),
    "onevision, trained": Layout("llava_onevision", llava_onevision, NESTED_TOWER_INSIDE),
    "internvl3 8B 2025": Layout("internvl3", internvl, shards=2, template="chat_template.jinja"),
    "internvl3 1B 2025": Layout(
        "internvl3", internvl, tied=True, text={"tie_word_embeddings": True},
        template="chat_template.jinja",
    ),
    "internvl3, trained": Layout(
        "internvl3", internvl, NESTED, config={"tie_word_embeddings": True},
        text={"tie_word_embeddings": False}, template="chat_template.jinja",
    ),
    "internvl3.5 38B 2025": Layout(
        "internvl3_5", internvl, shards=2, template="chat_template.jinja"
    ),
    "internvl3.5 1B 2025": Layout(
        "internvl3_5", internvl, tied=True, text={"tie_word_embeddings": True},
        template="chat_template.jinja",
    ),
    "idefics3 8B 2024": Layout("idefics3", idefics3, shards=2),
    "idefics3, tied inside": Layout(
        "idefics3", idefics3, tied=True, text={"tie_word_embeddings": True}
    ),
    "smolvlm2 500M 2025": Layout("smolvlm", smolvlm),
    "smolvlm2, tied": Layout("smolvlm", smolvlm, tied=True, config={"tie_word_embeddings": True}),
}  # fmt: skip
"""By name; "trained" is as trainers wrote a published one with transformers 4.52 to 4.57."""

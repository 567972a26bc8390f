"""The page of models names what is supported, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gc2ray.models.checkpoint.known_models import KNOWN_MODELS, KnownModel
from gc2ray.models.checkpoint.unsupported import CONVERSIONS, UNSUPPORTED

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
SUPPORTED, _, REFUSED = PAGE.partition("## Models that are refused")


@pytest.mark.parametrize("model", KNOWN_MODELS, ids=[model.name for model in KNOWN_MODELS])
def test_a_supported_model_has_a_line(model: KnownModel) -> None:
    start = rf"\| `{model.model_type}` \| [^|]*\b{re.escape(model.name)}\b[^|]* \| "
    decoder = "native" if model.decoder == "native" else "`generate`"
    assert re.search(rf"{start}\w+ \| `{model.score}` \| [^|]*: {decoder} \|", SUPPORTED)


def test_every_refused_model_type_is_there_once() -> None:
    lines = [line.split("|")[1] for line in REFUSED.splitlines() if line.startswith("| `")]
    named = [name for line in lines for name in re.findall(r"`([\w-]+)`", line)]
    assert sorted(named) == sorted({*UNSUPPORTED, *CONVERSIONS})

"""Weights that are quantised are recognised without being loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gc2ray.core.errors import ConfigError
from gc2ray.models.checkpoint.consistency import check_directory
from tests.support.model_files import Change


def tensors(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Change:
    def apply(model: Path) -> None:
        file = model / "model.safetensors"
        save_file(dict(change(load_file(file))), file, {"format": "pt"})

    return apply


def as_bytes(values: Any) -> Any:
    return values.astype(np.uint8)


@pytest.mark.parametrize(
    "part",
    ["qweight", "qzeros", "scales", "weight_packed", "weight_scale", "SCB", "weight.absmax",
     "weight.quant_state.bitsandbytes__nf4", None],
)  # fmt: skip
def test_quantised_weights_whose_configuration_is_lost_are_refused(
    model: Path, part: str | None
) -> None:
    """By the names that quantisers give, and by numbers that are no fractions."""

    def quantised(found: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in sorted(found) if name.endswith("up_proj.weight"))
        if part is None:
            return {**found, name: as_bytes(found[name])}
        return {**found, f"{name.removesuffix('weight')}{part}": found[name]}

    tensors(quantised)(model)
    with pytest.raises(ConfigError, match=r"quantised weights \(1 tensors, the first is .*but its"):
        check_directory(model)

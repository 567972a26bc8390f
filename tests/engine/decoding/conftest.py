"""The models that tests of decoders answer with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gc2ray.models.base import LoadedModel


@pytest.fixture
def model(loaded_models: dict[str, LoadedModel]) -> Any:
    return loaded_models["mistral"].model

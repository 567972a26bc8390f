"""The model that tests of the engine answer with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gc2ray.models.adapter import LoadedModel


@pytest.fixture
def loaded(loaded_models: dict[str, LoadedModel]) -> LoadedModel:
    return loaded_models["mistral"]

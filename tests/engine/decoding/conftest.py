"""The models that tests of decoders answer with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gc2ray.models.adapter import LoadedModel
    from tests.support.continuous_batching import Expected


@pytest.fixture
def model(loaded_models: dict[str, LoadedModel]) -> Any:
    return loaded_models["mistral"].model


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    """A language model of each kind, made once for all modules."""
    from tests.support.continuous_batching import KINDS, make_model

    return {kind: make_model(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def expected(models: dict[str, Any]) -> Expected:
    """What stock `generate` answers with them."""
    from tests.support.continuous_batching import Expected

    return Expected(models)

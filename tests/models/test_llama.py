"""Which language models are computed here, and which are refused."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gc2ray.models.adapter import LoadedModel
from gc2ray.models.llama import LanguageModel, unsupported
from tests.support.continuous_batching import KINDS, make_model


def test_unsupported_models_are_recognised(loaded_models: dict[str, LoadedModel]) -> None:
    assert all(unsupported(make_model(kind)) is None for kind in KINDS)
    assert all(unsupported(loaded.model) is None for loaded in loaded_models.values())
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0,
                                                "rope_theta": 1e4},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    assert "dynamic" in (unsupported(model) or "")
    with pytest.raises(ValueError, match="dynamic"):
        LanguageModel(model)
    assert "Linear" in (unsupported(nn.Linear(2, 2)) or "")

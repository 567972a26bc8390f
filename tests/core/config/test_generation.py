"""How answers are generated: seeds, and a model's own rules that a recipe takes over."""

from __future__ import annotations

import pytest

from gc2ray.core.config.generation import NOTHING, GenerationConfig, TakenOver
from tests.support.configs import config_error


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_a_seed_that_torch_cannot_take_is_refused(seed: int) -> None:
    assert config_error("recipe.generation.seed", seed).startswith("recipe.generation.seed: ")


def test_an_unknown_model_rule_is_refused_with_the_nearest() -> None:
    where = "recipe.generation.ignore_model_rules"
    assert config_error(where, ["min_length", "no_repeat_ngrams"]).startswith(
        f"{where}: unknown 'no_repeat_ngrams'; did you mean 'no_repeat_ngram_size'?"
    )
    assert "unknown 'temperature'; known: bad_words_ids, " in config_error(where, ["temperature"])


def test_a_recipe_takes_over_what_it_sets_and_what_it_names() -> None:
    assert GenerationConfig().taken_over() == NOTHING
    generation = GenerationConfig(
        ignore_model_rules=("min_length",), repetition_penalty=1.0, stop_token_ids=(7,)
    )
    assert generation.taken_over() == TakenOver(
        frozenset({"min_length", "repetition_penalty"}), (7,)
    )

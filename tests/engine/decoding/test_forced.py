"""Logits along given tokens, and how far they are from others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from gc2ray.engine.decoding.forced import ForcedDecoder, largest_difference
from gc2ray.engine.engine import load_recipe_model
from gc2ray.engine.parity.result import StockCheck
from gc2ray.models.base import Prompt
from tests.support.rows import make_job


def test_a_non_finite_logit_is_infinitely_far() -> None:
    logits = torch.randn(4, 9)
    assert largest_difference(logits, logits)[0] == 0
    for value in (torch.nan, torch.inf):
        wrong = logits.clone()
        wrong[2, 5] = value
        for pair in ((wrong, logits), (logits, wrong), (wrong, wrong)):
            assert largest_difference(*pair) == (torch.inf, 2)
    found = StockCheck(prompts=1, same_prompts=1, same_answers=1)
    assert found.passed("float32")
    assert not replace(found, difference=float("nan")).passed("float32")


def test_forced_tokens_give_the_logits_of_a_forward_pass(tiny_paths: dict[str, Path]) -> None:
    """Along its own answer a model's logits are those that it drew from."""
    job = make_job(tiny_paths["mistral"])
    loaded = load_recipe_model(job.recipe, job.cluster)
    table = loaded.model.get_input_embeddings()
    with torch.inference_mode():
        prompt = Prompt(table(torch.arange(10, 30)))
    logits = ForcedDecoder(loaded.model).logits(prompt, [50, 51, 52])
    ids = torch.tensor([[*range(10, 30), 50, 51, 52]])
    with torch.inference_mode():
        wanted = loaded.model(input_ids=ids).logits[0, 19:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)

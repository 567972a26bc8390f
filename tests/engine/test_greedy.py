"""The plain greedy loop: stock's answers without gaps, and the right ones behind a gap."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gc2ray.models.adapter import LoadedModel
from tests.support.greedy import plain_greedy

NEW = 12


@pytest.fixture(params=["mistral", "vicuna"])
def model(request: pytest.FixtureRequest, loaded_models: dict[str, LoadedModel]) -> Any:
    return loaded_models[request.param].model


def embeds_of(model: Any, length: int = 40, seed: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    table = model.get_input_embeddings()
    with torch.no_grad():
        return table(torch.randint(10, table.num_embeddings, (length,), generator=draw))


def stock(model: Any, embeds: torch.Tensor, **more: Any) -> list[int]:
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    inputs = {"inputs_embeds": embeds[None], "attention_mask": mask, **more}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
    return output[0].tolist()


def gapped(length: int = 40) -> torch.Tensor:
    positions = torch.arange(length)
    positions[10:] += 25
    positions[30:] += 400
    return positions


@torch.inference_mode()
def recomputed(model: Any, embeds: torch.Tensor, positions: torch.Tensor) -> list[int]:
    """Without a cache: the whole sequence is read anew for every token."""
    tokens: list[int] = []
    table = model.get_input_embeddings()
    for _ in range(NEW):
        output = model(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
            use_cache=False,
        )
        tokens.append(int(output.logits[0, -1].argmax()))
        embeds = torch.cat([embeds, table(torch.tensor(tokens[-1:]))])
        positions = torch.cat([positions, positions[-1:] + 1])
    return tokens


def test_without_gaps_it_is_stock_generate(model: Any) -> None:
    answers = []
    for seed in range(5):
        embeds = embeds_of(model, seed=seed)
        eos = [model.generation_config.eos_token_id]
        answers.append(plain_greedy(model, embeds, torch.arange(40), NEW, eos))
        assert answers[-1] == stock(model, embeds)
    assert len({tuple(answer) for answer in answers}) > 1, "this test could not fail"


def test_after_a_gap_it_continues_at_the_next_position(model: Any) -> None:
    embeds = embeds_of(model)
    found = plain_greedy(model, embeds, gapped(), NEW)
    assert found == recomputed(model, embeds, gapped())
    assert found != plain_greedy(model, embeds, torch.arange(40), NEW), "the gap says nothing"


def test_it_stops_after_the_end_token(model: Any) -> None:
    embeds, positions = embeds_of(model), torch.arange(40)
    free = plain_greedy(model, embeds, positions, NEW)
    assert len(free) == NEW
    end = free[4]
    assert plain_greedy(model, embeds, positions, NEW, {end}) == free[: free.index(end) + 1]

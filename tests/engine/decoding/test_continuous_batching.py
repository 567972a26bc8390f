"""Continuous batching: nothing about a row's neighbours, place or arrival changes its tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention_backends import attend_by_row
from gc2ray.models.layers.linear import Linear
from gc2ray.models.llama import LanguageModel
from tests.support.continuous_batching import (
    KINDS,
    PLENTY,
    REQUESTS,
    ROOMS,
    Expected,
    Scarce,
    decode,
    one_by_one,
    ragged,
    run,
    tokens,
)
from tests.support.greedy import plain_greedy


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_generate(
    models: dict[str, Any], expected: Expected, kind: str, room: DecodeLimits
) -> None:
    model = models[kind]
    assert tokens(decode(model, ragged(model), room)) == expected[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_arrival_changes_nothing(
    models: dict[str, Any], expected: Expected, kind: str
) -> None:
    requests = ragged(models[kind])
    for seed in range(3):
        random.Random(seed).shuffle(requests)
        assert tokens(decode(models[kind], requests, DecodeLimits(700))) == expected[kind]


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen2"])
def test_sampled_tokens_are_those_of_one_slot(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    requests = ragged(model, temperature=1.3, top_p=0.9)
    alone = tokens(decode(model, requests, ROOMS["one slot"]))
    assert alone != tokens(decode(model, ragged(model))), "sampling is greedy"
    for name in ("five slots", "few tokens", "plenty"):
        assert tokens(decode(model, requests, ROOMS[name])) == alone
    random.Random(1).shuffle(requests)
    assert tokens(decode(model, requests, DecodeLimits(700))) == alone


def test_greedy_and_sampled_rows_share_steps(models: dict[str, Any], expected: Expected) -> None:
    model = models["llama"]
    sampled = ragged(model, temperature=1.3)
    mixed = [s if s[0] % 2 else g for g, s in zip(ragged(model), sampled, strict=True)]
    found = tokens(decode(model, mixed))
    alone = tokens(decode(model, sampled, ROOMS["one slot"]))
    assert found == {tag: (alone if tag % 2 else expected["llama"])[tag] for tag in found}


def test_packed_and_plain_layers_decode_the_same(
    models: dict[str, Any], expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where oneDNN is missing the model's own weights are used, and nobody notices."""
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    model = models["qwen2"]
    assert not Linear.from_layers(model.lm_head).packed
    assert tokens(decode(model, ragged(model))) == expected["qwen2"]


@pytest.mark.parametrize("kind", ["llama-gqa-biased", "mistral-window", "qwen3"])
def test_attention_of_torch_and_compiled_decode_the_same(
    models: dict[str, Any], expected: Expected, kind: str
) -> None:
    """Where nothing was compiled torch's attention is used, and nobody notices."""
    model = models[kind]
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=attend_by_row)
    assert tokens(run(decoder, ragged(model))) == expected[kind]


def test_the_model_is_unchanged(models: dict[str, Any], expected: Expected) -> None:
    model = models["llama"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decode(model, ragged(model))
    after = model.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())
    assert one_by_one(model, ragged(model, 3)) == {tag: expected["llama"][tag] for tag in range(3)}


# Ends


def test_rows_end_at_their_own_end(models: dict[str, Any], expected: Expected) -> None:
    full = expected["llama"]
    late = [row for row in full.values() if len(row) > 6]
    eos, own = late[0][2], late[1][3]
    requests = [
        (tag, prompt, sampling.model_copy(update={"stop_token_ids": (own,) if tag % 2 else ()}))
        for tag, prompt, sampling in ragged(models["llama"])
    ]
    done = decode(models["llama"], requests, DecodeLimits(700), eos=[eos])
    stopped = 0
    for tag, row in full.items():
        ends = {eos, own} if tag % 2 else {eos}
        cut = next((at for at, token in enumerate(row) if token in ends), None)
        wanted = row if cut is None else row[: cut + 1]
        reason = "length" if cut is None else "stop"
        assert (done[tag].token_ids, done[tag].finish_reason) == (wanted, reason)
        stopped += cut is not None
    assert 3 < stopped < REQUESTS


def test_max_repeats_cuts_a_row_that_loops(models: dict[str, Any]) -> None:
    model = models["llama"]
    requests = [
        (t, p, s.model_copy(update={"max_new_tokens": 200})) for t, p, s in ragged(model, 20)
    ]
    free = decode(model, requests)
    guarded = decode(
        model,
        [(t, p, s.model_copy(update={"max_repeats": 3})) for t, p, s in requests],
        DecodeLimits(2000),
    )
    cut = [tag for tag in free if guarded[tag].finish_reason == "repetition"]
    assert cut, "no row loops: nothing is tested"
    for tag in free:
        found = guarded[tag].token_ids
        assert found == free[tag].token_ids[: len(found)]
        assert (len(found) < 200) is (tag in cut)
    assert {free[tag].finish_reason for tag in cut} == {"length"}


# Room


def test_rows_come_back_as_they_finish(models: dict[str, Any]) -> None:
    """A short row does not wait for a long one, and its room goes to the next."""
    model = models["llama"]
    prompt = ragged(model, 1)[0][1]
    decoder = ContinuousBatchDecoder(
        LanguageModel(model), DecodeLimits(20_000, live_rows=2), eos=()
    )
    for tag, limit in enumerate([40, 2, 2, 2]):
        assert decoder.submit(tag, prompt, GenerationConfig(max_new_tokens=limit))
    order = []
    steps = 0
    while len(decoder):
        order += [item.tag for item in decoder.step()]
        steps += 1
    assert order == [1, 2, 3, 0]
    assert steps == 40


def test_back_pressure_counts_tokens_and_never_rows(models: dict[str, Any]) -> None:
    model = models["llama"]
    table = model.get_input_embeddings()
    long, short = (Prompt(table(torch.ones(n, dtype=torch.long)).detach()) for n in (40, 1))
    decoder = ContinuousBatchDecoder(
        LanguageModel(model), DecodeLimits(1000, prefill_tokens=50), eos=()
    )
    taken = [decoder.submit(tag, long, GenerationConfig(max_new_tokens=2)) for tag in range(4)]
    assert taken == [True, True, False, False]
    decoder = ContinuousBatchDecoder(
        LanguageModel(model), DecodeLimits(1000, prefill_tokens=50), eos=()
    )
    taken = [decoder.submit(tag, short, GenerationConfig(max_new_tokens=2)) for tag in range(101)]
    assert taken == [True] * 100 + [False]
    assert len(decoder) == 100
    decoder.step()
    assert decoder.submit(200, short, GenerationConfig(max_new_tokens=2))


def test_short_rows_run_beside_a_long_one(models: dict[str, Any]) -> None:
    """With room for 130 tokens a row of 90 runs beside short ones, as many as tokens allow."""
    model = models["llama"]
    table = model.get_input_embeddings()
    long, short = (Prompt(table(torch.ones(n, dtype=torch.long)).detach()) for n in (80, 4))
    decoder = ContinuousBatchDecoder(LanguageModel(model), DecodeLimits(130), eos=())
    assert decoder.submit(0, long, GenerationConfig(max_new_tokens=10))
    for tag in range(1, 8):
        assert decoder.submit(tag, short, GenerationConfig(max_new_tokens=4))
    done = [item.tag for _ in range(4) for item in decoder.step()]
    assert done == [1, 2, 3, 4, 5]


def test_a_long_row_is_admitted_in_time(models: dict[str, Any]) -> None:
    model = models["llama"]
    table = model.get_input_embeddings()
    long, short = (Prompt(table(torch.ones(n, dtype=torch.long)).detach()) for n in (80, 4))
    decoder = ContinuousBatchDecoder(
        LanguageModel(model), DecodeLimits(100, prefill_tokens=60), eos=()
    )
    order: list[int] = []
    for tag in range(60):
        request = (tag, long if tag == 10 else short, GenerationConfig(max_new_tokens=6))
        while not decoder.submit(*request):
            order += [item.tag for item in decoder.step()]
    while len(decoder):
        order += [item.tag for item in decoder.step()]
    assert order.index(10) < 25


def test_a_row_that_can_never_fit_is_refused(models: dict[str, Any]) -> None:
    decoder = ContinuousBatchDecoder(LanguageModel(models["llama"]), DecodeLimits(30), eos=())
    prompt = Prompt(torch.zeros(28, 64))
    with pytest.raises(BadRow, match=r"33 tokens .* holds 30 \(cluster.kv_tokens\)") as caught:
        decoder.submit(0, prompt, GenerationConfig(max_new_tokens=5))
    assert caught.value.status == Status.TOO_LONG
    assert len(decoder) == 0
    assert decoder.submit(0, prompt, GenerationConfig(max_new_tokens=2))


def test_time_is_divided_among_rows(models: dict[str, Any]) -> None:
    done = decode(models["llama"], ragged(models["llama"], 8))
    assert all(item.prefill_ns > 0 for item in done.values())
    assert all((item.generate_ns > 0) is (len(item.token_ids) > 1) for item in done.values())


# Trouble


@pytest.mark.parametrize("rows", [1, 2, 5, 11])
def test_too_little_memory_halves_the_live_rows(
    models: dict[str, Any], expected: Expected, rows: int
) -> None:
    scarce = Scarce(rows)
    model = models["llama"]
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=scarce)
    done = run(decoder, ragged(model))
    assert tokens(done) == expected["llama"]
    assert decoder.oom_splits > 0
    assert 0 < max(item.oom_splits for item in done.values()) <= decoder.oom_splits
    assert sum(item.oom_splits for item in done.values()) >= (rows + 1) * decoder.oom_splits
    assert scarce.most >= max(1, rows // 2)


def test_a_row_that_does_not_fit_alone_fails_no_other(
    models: dict[str, Any], expected: Expected
) -> None:
    model = models["llama"]
    requests = ragged(model)
    longest = max(requests, key=lambda request: len(request[1]))
    scarce = Scarce(REQUESTS)
    scarce.poison = len(longest[1])
    same = [r[0] for r in requests if len(r[1]) <= scarce.poison < len(r[1]) + r[2].max_new_tokens]
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=scarce)
    done = run(decoder, requests)
    failed = [tag for tag, item in done.items() if item.error]
    assert sorted(failed) == same
    assert all(isinstance(done[tag].error, torch.OutOfMemoryError) for tag in failed)
    assert all(done[tag].finish_reason == "error" for tag in failed)
    good = {tag: done[tag].token_ids for tag in sorted(done) if tag not in failed}
    assert good == {tag: row for tag, row in expected["llama"].items() if tag not in failed}
    before = scarce.most
    run(decoder, [(tag, *rest) for tag, *rest in requests if tag not in failed])
    assert scarce.most >= before, "one bad row lowered the number of live rows for ever"


def test_an_error_in_a_step_fails_one_row_only(models: dict[str, Any], expected: Expected) -> None:
    model = models["llama"]
    requests = ragged(model, 12)
    scarce = Scarce(REQUESTS, RuntimeError)
    scarce.poison = len(requests[3][1]) + 2  # in the middle of its answer
    broken = [
        tag
        for tag, prompt, sampling in requests
        if len(prompt) <= scarce.poison < len(prompt) + sampling.max_new_tokens
    ]
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=scarce)
    done = run(decoder, requests)
    assert sorted(tag for tag, item in done.items() if item.error) == broken
    assert {str(done[tag].error) for tag in broken} == {"this one breaks it"}
    good = [tag for tag in done if tag not in broken]
    assert len(good) > 3
    assert all(done[tag].token_ids == expected["llama"][tag] for tag in good)
    assert decoder.oom_splits == 0


def test_a_lost_device_is_not_an_error_of_a_row(models: dict[str, Any]) -> None:
    scarce = Scarce(0, torch.AcceleratorError)
    decoder = ContinuousBatchDecoder(LanguageModel(models["llama"]), PLENTY, eos=(), attend=scarce)
    decoder.submit(*ragged(models["llama"], 1)[0])
    with pytest.raises(torch.AcceleratorError):
        decoder.step()


# Positions


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_positions_may_have_gaps(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    rng = random.Random(5)
    requests, wanted = [], {}
    for tag, prompt, sampling in ragged(model, 16):
        steps = torch.tensor([rng.choice([1, 1, 1, 7]) for _ in range(len(prompt))])
        positions = steps.cumsum(0) - steps[0]
        requests.append((tag, replace(prompt, positions=positions), sampling))
        wanted[tag] = tuple(
            plain_greedy(model, prompt.embeds, positions, sampling.max_new_tokens, ())
        )
    found = tokens(decode(model, requests, DecodeLimits(400)))
    assert found == wanted
    assert found != tokens(decode(model, ragged(model, 16))), "positions change nothing"


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_every_cpu_capability_decodes_the_same(
    models: dict[str, Any], expected: Expected, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for kind in ("llama-gqa-biased", "qwen2", "qwen3"):
        assert tokens(decode(models[kind], ragged(models[kind]))) == expected[kind]

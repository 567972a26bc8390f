"""Continuous batching: nothing about a row's neighbours, place or arrival changes its tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.cuda_graph import CudaGraphRunner, GraphRow, GraphShape
from gc2ray.engine.decoding.decoder import Completion
from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange
from gc2ray.engine.decoding.prefix_cache import PrefixCache
from gc2ray.engine.decoding.sampler import Repetition
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models import loading
from gc2ray.models.base import LoadedModel, Prompt
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.hf_reference import stock_generate
from gc2ray.models.layers.attention import Chunk, KvShape, Step, write
from gc2ray.models.layers.attention_backends import (
    _agrees,
    attend_by_row,
    attend_flash,
    attend_padded,
    attend_varlen,
    choose_attention,
)
from gc2ray.models.layers.linear import FEW_ROWS, Linear, packed_module, rows_to_run
from gc2ray.models.llama import LanguageModel, unsupported
from tests.support.greedy import plain_greedy

VOCABULARY, REQUESTS = 300, 64
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama-gqa-biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
}
PLENTY = DecodeLimits(20_000)
ROOMS = {
    "one slot": DecodeLimits(20_000, live_rows=1),
    "five slots": DecodeLimits(20_000, live_rows=5),
    "few tokens": DecodeLimits(150),
    "small steps": DecodeLimits(20_000, prefill_tokens=1),
    "plenty": PLENTY,
}
Submitted = tuple[int, Prompt, GenerationConfig]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {kind: make_model(kind) for kind in KINDS}


def make_model(kind: str) -> Any:
    config_class, model_class, settings_ = KINDS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    spread = {"vocab_size": VOCABULARY, "initializer_range": 0.15}
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **heads, **spread, **settings_})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def ragged(model: Any, requests: int = REQUESTS, **changes: Any) -> list[Submitted]:
    """Prompts of 1 to 70 tokens, limits of 1 to 16."""
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    table = model.get_input_embeddings()
    made = []
    for tag in range(requests):
        ids = torch.randint(VOCABULARY, (rng.randint(1, 70),), generator=generator)
        sampling = GenerationConfig(max_new_tokens=rng.randint(1, 16), seed=1000 + tag)
        with torch.no_grad():
            made.append((tag, Prompt(table(ids)), sampling.model_copy(update=changes)))
    return made


def worded(model: Any, requests: int = REQUESTS, **changes: Any) -> list[Submitted]:
    """The same prompts, of which is known what their text was."""
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    made = []
    for tag, prompt, sampling in ragged(model, requests, **changes):
        ids = torch.randint(VOCABULARY, (rng.randint(1, 70),), generator=generator)
        rng.randint(1, 16)
        made.append((tag, replace(prompt, token_ids=tuple(ids.tolist())), sampling))
    return made


def run(decoder: ContinuousBatchDecoder, requests: Iterable[Submitted]) -> dict[int, Completion]:
    """Everything, by tag."""
    done: list[Completion] = []
    for request in requests:
        while not decoder.submit(*request):
            done += decoder.step()
    while len(decoder):
        done += decoder.step()
    assert decoder.step() == []
    assert len({item.tag for item in done}) == len(done)
    return {item.tag: item for item in done}


def decode(
    model: Any, requests: Sequence[Submitted], room: DecodeLimits = PLENTY, eos: Iterable[int] = ()
) -> dict[int, Completion]:
    return run(ContinuousBatchDecoder(LanguageModel(model), room, eos=eos), requests)


def tokens(done: dict[int, Completion]) -> dict[int, tuple[int, ...]]:
    assert [str(item.error) for item in done.values() if item.error] == []
    return {tag: done[tag].token_ids for tag in sorted(done)}


def one_by_one(model: Any, requests: Sequence[Submitted]) -> dict[int, tuple[int, ...]]:
    """Stock `generate`, a prompt at a time."""
    answers = {}
    for tag, prompt, sampling in requests:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        output = model.generate(
            inputs_embeds=prompt.embeds[None],
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
        )
        answers[tag] = tuple(output[0].tolist())
    return answers


class Expected:
    """Stock's answers by kind of model, made when they are asked for."""

    def __init__(self, models: dict[str, Any]) -> None:
        self._models = models
        self._found: dict[str, dict[int, tuple[int, ...]]] = {}

    def __getitem__(self, kind: str) -> dict[int, tuple[int, ...]]:
        if kind not in self._found:
            found = one_by_one(self._models[kind], ragged(self._models[kind]))
            assert len(set(found.values())) > REQUESTS - 5, "answers alike: nothing could fail"
            self._found[kind] = found
        return self._found[kind]


@pytest.fixture(scope="module")
def expected(models: dict[str, Any]) -> Expected:
    return Expected(models)


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


@pytest.mark.parametrize("kind", ["llama-gqa-biased", "mistral-window"])
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


def test_cache_space_is_more_than_zero() -> None:
    for settings_ in ({"kv_tokens": 0}, {"kv_tokens": 9, "prefill_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            DecodeLimits(**settings_)


def test_time_is_divided_among_rows(models: dict[str, Any]) -> None:
    done = decode(models["llama"], ragged(models["llama"], 8))
    assert all(item.prefill_ns > 0 for item in done.values())
    assert all((item.generate_ns > 0) is (len(item.token_ids) > 1) for item in done.values())


# Trouble


class Scarce:
    """Attention on a device whose memory is short: more than `rows` sequences do not fit."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.rows, self.error = rows, error
        self.most = 0
        self.poison: float | None = None

    def __call__(self, step: Step, layer: int, queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        if layer == 1:  # in the middle, when one layer's cache is written
            if len(step.chunks) > self.rows:
                raise self.error("no room")
            lengths = [chunk.length for chunk in step.chunks]
            if self.poison is not None and self.poison in lengths:
                raise self.error("this one breaks it")
            self.most = max(self.most, len(step.chunks))
        return attend_by_row(step, layer, queries, *rest)


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


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
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


# Shared prefixes


def families_of(model: Any, per_group: Sequence[int]) -> list[Submitted]:
    """Groups of prompts that begin alike, group after group."""
    generator = torch.Generator().manual_seed(8)
    table = model.get_input_embeddings()
    made: list[Submitted] = []

    def embedded(length: int) -> torch.Tensor:
        return table(torch.randint(VOCABULARY, (length,), generator=generator)).detach()

    for group, members in enumerate(per_group):
        start = embedded(20 + 7 * group)
        for member in range(members):
            embeds = torch.cat([start, embedded(3 + member)])
            prompt = Prompt(embeds, ((2, len(start)),), prefix_key=f"image {group}")
            made.append((len(made), prompt, GenerationConfig(max_new_tokens=5 + member % 4)))
    return made


def alone(requests: Sequence[Submitted]) -> list[Submitted]:
    return [(tag, replace(p, prefix_key=None), sampling) for tag, p, sampling in requests]


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen2"])
def test_prompts_that_begin_alike_share_it_and_answer_the_same(
    models: dict[str, Any], kind: str, room: DecodeLimits
) -> None:
    requests = families_of(models[kind], [6, 1, 9, 2])
    done = decode(models[kind], requests, room)
    assert tokens(done) == tokens(decode(models[kind], alone(requests), room))
    shared = [item.shared for item in done.values()]
    assert sum(shared) >= 5 * 20, "nothing was shared"
    assert all(item.shared in (0, requests[tag][1].prefix) for tag, item in done.items())


def test_a_prefix_is_computed_once(models: dict[str, Any]) -> None:
    """Also where its rows come one after the other, with other rows between them."""
    requests = families_of(models["llama"], [5, 5])
    mixed = [request for pair in zip(requests[:5], requests[5:], strict=True) for request in pair]
    for room in (PLENTY, DecodeLimits(20_000, live_rows=1)):
        done = decode(models["llama"], mixed, room)
        assert sorted(item.shared > 0 for item in done.values()) == [False] * 2 + [True] * 8


def test_prefixes_are_dropped_for_rows(models: dict[str, Any]) -> None:
    """Prefixes nobody reads are dropped when their room is wanted; even a row's own."""
    model = models["llama"]
    requests = families_of(model, [2] * 6)
    done = decode(model, requests, DecodeLimits(80))
    assert tokens(done) == tokens(decode(model, alone(requests)))
    two = families_of(model, [2])
    tight = DecodeLimits(max(len(prompt) + sampling.max_new_tokens for _, prompt, sampling in two))
    assert tokens(decode(model, two, tight)) == tokens(decode(model, alone(two)))


def test_sharing_survives_too_little_memory(models: dict[str, Any]) -> None:
    model = models["llama"]
    requests = families_of(model, [6, 6])
    decoder = ContinuousBatchDecoder(LanguageModel(model), PLENTY, eos=(), attend=Scarce(2))
    assert tokens(run(decoder, requests)) == tokens(decode(model, alone(requests)))
    assert decoder.oom_splits > 0


# The KV cache


SHAPE = KvShape(layers=2, heads=3, head_size=4)


def make_pool(tokens_: int) -> KvCache:
    return KvCache(SHAPE, tokens_, dtype=torch.float32, device=torch.device("cpu"))


def free_tokens(kv_cache: KvCache) -> int:
    return sum(len(slots) for slots in kv_cache._free)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 9)), max_size=60))
def test_cache_regions_never_overlap_and_are_all_freed(asked: list[tuple[int, int]]) -> None:
    kv_cache = make_pool(100)
    held: list[SlotRange] = []
    for size, which in asked:
        slots = kv_cache.allocate(size)
        if slots is None:
            largest = max((len(free) for free in kv_cache._free), default=0)
            assert largest < size
            if held:
                kv_cache.release(held.pop(which % len(held)))
        else:
            assert len(slots) == size
            held.append(slots)
        taken = sorted(held)
        assert all(a.stop <= b.start for a, b in pairwise(taken))
        assert free_tokens(kv_cache) == 100 - sum(len(slots) for slots in held)
    for slots in held:
        kv_cache.release(slots)
    assert kv_cache.allocate(100) == SlotRange(0, 100)


def test_cache_space_is_not_freed_twice() -> None:
    kv_cache = make_pool(10)
    a, b = kv_cache.allocate(4), kv_cache.allocate(4)
    assert a is not None
    assert b is not None
    kv_cache.release(a)
    with pytest.raises(ValueError, match="free already"):
        kv_cache.release(a)
    with pytest.raises(ValueError, match="free already"):
        kv_cache.release(SlotRange(3, 6))
    kv_cache.release(b)
    assert free_tokens(kv_cache) == 10
    with pytest.raises(ValueError, match="at least one"):
        kv_cache.allocate(0)


def test_a_kv_cache_has_the_stated_size() -> None:
    kv_cache = make_pool(10)
    assert kv_cache.states.nbytes == 10 * 2 * 2 * 3 * 4 * 4
    assert kv_cache.view(SlotRange(2, 5)).shape == (2, 2, 3, 3, 4)


def test_prefixes_stay_until_their_space_is_needed() -> None:
    kv_cache = make_pool(10)
    prefixes = PrefixCache(kv_cache)
    for key in ("a", "b"):
        slots = kv_cache.allocate(4)
        assert slots is not None
        prefixes.add(key, slots)
    with pytest.raises(ValueError, match="in the cache already"):
        prefixes.add("a", SlotRange(0, 1))
    assert not prefixes.drop_oldest(), "their rows are live"
    prefixes.disown("a")
    prefixes.disown("b")
    assert prefixes.find("a") == SlotRange(0, 4)  # and so used after b
    assert prefixes.find(None) is None
    assert prefixes.drop_oldest()
    assert ("a" in prefixes, "b" in prefixes) == (True, False)
    assert not prefixes.drop_oldest(but="a")
    assert prefixes.drop_oldest()
    assert free_tokens(kv_cache) == 10


# Bursts: what GPUs do, without the GPU


BURSTS = DecodeLimits(20_000, graph_steps=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "room",
    [BURSTS, DecodeLimits(400, graph_steps=7), DecodeLimits(20_000, live_rows=3, graph_steps=16)],
)
def test_graph_replays_give_the_tokens_of_generate(
    models: dict[str, Any], expected: Expected, kind: str, room: DecodeLimits
) -> None:
    model = models[kind]
    decoder = ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend_padded)
    assert tokens(run(decoder, ragged(model))) == expected[kind]


def test_graph_replays_sample_as_single_steps(models: dict[str, Any]) -> None:
    model = models["llama"]
    mixed = [
        (
            tag,
            prompt,
            sampling.model_copy(update={"temperature": 1.3 * (tag % 3 > 0), "top_p": 0.9}),
        )
        for tag, prompt, sampling in ragged(model)
    ]
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=(), attend=attend_padded)
    assert tokens(run(decoder, mixed)) == tokens(decode(model, mixed))


def test_tokens_after_the_end_of_a_row_are_discarded(
    models: dict[str, Any], expected: Expected
) -> None:
    full = expected["llama"]
    eos = next(row for row in full.values() if len(row) > 6)[2]
    model = models["llama"]
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=[eos], attend=attend_padded)
    done = run(decoder, ragged(model))
    stepped = decode(model, ragged(model), eos=[eos])
    assert tokens(done) == tokens(stepped)
    assert {tag: item.finish_reason for tag, item in done.items()} == {
        tag: item.finish_reason for tag, item in stepped.items()
    }
    assert any(item.finish_reason == "stop" for item in done.values())


def test_graph_replays_share_prefixes_and_survive_too_little_memory(models: dict[str, Any]) -> None:
    class ScarcePadded(Scarce):
        def __call__(self, step: Any, layer: int, queries: torch.Tensor, *rest: Any) -> Any:
            if layer == 1 and len(step.used) > self.rows:
                raise self.error("no room")
            return attend_padded(step, layer, queries, *rest)

    model = models["llama"]
    requests = families_of(model, [6, 6])
    decoder = ContinuousBatchDecoder(LanguageModel(model), BURSTS, eos=(), attend=ScarcePadded(2))
    assert tokens(run(decoder, requests)) == tokens(decode(model, alone(requests)))
    assert decoder.oom_splits > 0


def test_graph_replays_read_no_values_between_steps(models: dict[str, Any]) -> None:
    """As many looks at values for one step as for eight: a graph could not hold any."""
    model = LanguageModel(models["llama"])
    kv_cache = KvCache(model.kv_shape, 600, dtype=torch.float32, device=torch.device("cpu"))
    rows = [
        GraphRow(5, 3, 10, 3, GenerationConfig(max_new_tokens=9)),
        GraphRow(6, 9, 100, 9, GenerationConfig(max_new_tokens=9, temperature=1.0), (0.3,) * 9),
    ]
    kv_cache.states.normal_()
    counts = []
    for steps in (1, 8):
        shape = GraphShape(3, 512, draws=True, penalises=True)
        burst = CudaGraphRunner(model, kv_cache.states, attend_padded, shape, 8)
        with torch.profiler.profile() as profile:
            burst.run(rows, steps)
        counts.append(sum(e.count for e in profile.key_averages() if "_local_scalar" in e.key))
    assert counts[0] == counts[1]


def test_missing_rows_of_a_graph_write_to_no_row(models: dict[str, Any]) -> None:
    model = LanguageModel(models["llama"])
    kv_cache = KvCache(model.kv_shape, 600, dtype=torch.float32, device=torch.device("cpu"))
    kv_cache.states.zero_()
    burst = CudaGraphRunner(
        model, kv_cache.states, attend_padded, GraphShape(4, 512, draws=False), 3
    )
    burst.run([GraphRow(5, 3, 10, 3, GenerationConfig(max_new_tokens=9))], 3)
    touched = kv_cache.states.abs().sum(dim=(0, 1, 2, 4)).nonzero().flatten().tolist()
    assert touched == [0, 13, 14, 15]


@pytest.mark.parametrize(
    ("asked", "made"), [(1, 1), (3, 4), (9, 12), (13, 16), (17, 24), (200, 256)]
)
def test_few_graph_shapes_are_recorded(asked: int, made: int) -> None:
    assert GraphShape.from_counts(asked, 1, draws=False) == GraphShape(made, 512, draws=False)
    assert GraphShape.from_counts(1, 513, draws=True) == GraphShape(1, 768, draws=True)


# Numbers that are no numbers

MODES: dict[str, tuple[DecodeLimits, Any]] = {
    "steps": (PLENTY, None),
    "few slots": (DecodeLimits(20_000, live_rows=5), None),
    "attention of torch": (PLENTY, attend_by_row),
    "bursts": (BURSTS, attend_padded),
    "long bursts": (DecodeLimits(20_000, graph_steps=16), attend_padded),
}


@pytest.mark.parametrize(
    ("mode", "value"),
    [*((mode, torch.nan) for mode in MODES), ("steps", torch.inf), ("bursts", -torch.inf)],
)
def test_a_row_whose_logits_are_not_finite_fails_alone(
    models: dict[str, Any], expected: Expected, mode: str, value: float
) -> None:
    """One from its prompt on, others from a token on that they wrote; nobody else notices."""
    model, full = models["llama"], expected["llama"]
    room, attend = MODES[mode]
    requests = ragged(model)
    requests[5][1].embeds[-1, 7] = value
    often = Counter(token for row in full.values() for token in {*row[:-1]})
    fatal = next(token for token, rows in often.items() if rows == 2)
    language = LanguageModel(model)
    language.embed = poisoned(language.embed, fatal, value)  # type: ignore[method-assign]
    done = run(ContinuousBatchDecoder(language, room, eos=(), attend=attend), requests)
    lost = {tag: row.index(fatal) + 1 for tag, row in full.items() if fatal in row[:-1]} | {5: 0}
    assert len(lost) == 3
    for tag, item in done.items():
        if tag in lost:
            assert (item.finish_reason, item.token_ids) == ("error", ())
            assert f"not finite (NaN or infinite) after {lost[tag]} tokens" in str(item.error)
        else:
            assert (item.error, item.token_ids) == (None, full[tag])


def poisoned(embed: Callable[[Tensor], Tensor], fatal: int, value: float) -> Any:
    """An embedding table with one row that is no vector of numbers."""
    return lambda ids: embed(ids).masked_fill((ids == fatal)[:, None], value)


@pytest.mark.parametrize("mode", MODES)
def test_a_sampled_row_whose_logits_are_not_finite_fails_alone(
    models: dict[str, Any], mode: str
) -> None:
    """A sampled row whose logits are not finite draws nothing, within bounds."""
    model = models["llama"]
    room, attend = MODES[mode]
    requests = ragged(model, 6, temperature=1.3, top_p=0.9)
    wanted = tokens(decode(model, requests))
    requests[2] = (2, replace(requests[2][1], embeds=requests[2][1].embeds * torch.nan), REPEATED)
    done = run(ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend), requests)
    assert [tag for tag, item in done.items() if item.error] == [2]
    assert {tag: done[tag].token_ids for tag in wanted if tag != 2} == {
        tag: row for tag, row in wanted.items() if tag != 2
    }


# What rows repeat

REPEATED = GenerationConfig(max_new_tokens=16, temperature=1.3, repetition_penalty=1.4)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
@pytest.mark.parametrize("mode", MODES)
def test_penalised_tokens_are_those_of_generate(
    models: dict[str, Any], expected: Expected, mode: str, penalty: float
) -> None:
    """The prompt's tokens and the answer's; rows without a penalty share steps with the others."""
    model = models["llama"]
    room, attend = MODES[mode]
    requests = [
        (
            tag,
            prompt,
            sampling.model_copy(update={"repetition_penalty": penalty if tag % 4 else 1.0}),
        )
        for tag, prompt, sampling in worded(model, 20)
    ]
    found = tokens(
        run(ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend), requests)
    )
    changed = 0
    for tag, prompt, sampling in requests:
        ids = torch.tensor([prompt.token_ids])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            repetition_penalty=sampling.repetition_penalty,
        )
        assert found[tag] == tuple(output[0, len(prompt) :].tolist())
        changed += found[tag] != expected["llama"][tag]
    assert changed > 5, "the penalty changes nothing: this test could not fail"


@pytest.mark.parametrize("mode", ["few slots", "bursts"])
def test_penalised_rows_sample_what_they_sample_alone(models: dict[str, Any], mode: str) -> None:
    model = models["llama"]
    room, attend = MODES[mode]
    requests = worded(model, 24, temperature=1.3, top_p=0.9, repetition_penalty=1.3)
    alone = tokens(decode(model, requests, ROOMS["one slot"]))
    assert alone != tokens(decode(model, worded(model, 24, temperature=1.3, top_p=0.9)))
    decoder = ContinuousBatchDecoder(LanguageModel(model), room, eos=(), attend=attend)
    assert tokens(run(decoder, requests)) == alone


def test_without_a_penalty_no_tokens_are_counted(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Repetition, "load", None)
    monkeypatch.setattr(Repetition, "applied", None)
    requests = worded(models["llama"], 5)
    assert len(tokens(decode(models["llama"], requests))) == 5
    decoder = ContinuousBatchDecoder(
        LanguageModel(models["llama"]), BURSTS, eos=(), attend=attend_padded
    )
    assert len(tokens(run(decoder, requests))) == 5


# Attention, layers, models


def fake_varlen(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, ends: torch.Tensor,
    starts: torch.Tensor, most_new: int, most_used: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool, seqused_k: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What flash attention's documentation says of these arguments, in loops."""
    assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    assert {t.dtype for t in (ends, starts, seqused_k)} == {torch.int32}
    assert len(ends) == len(starts) == len(seqused_k) + 1
    assert (window_size[1], enable_gqa) == (0, queries.shape[1] != keys.shape[1])
    out = torch.empty_like(queries)
    for s, used in enumerate(seqused_k.tolist()):
        new = int(ends[s + 1] - ends[s])
        assert new <= most_new
        assert used <= most_used
        for q in range(new):
            at = used - new + q
            first = 0 if window_size[0] < 0 else max(0, at - window_size[0])
            rows = slice(int(starts[s]) + first, int(starts[s]) + at + 1)
            for head in range(queries.shape[1]):
                shared = head * keys.shape[1] // queries.shape[1]
                weights = (keys[rows, shared] @ queries[int(ends[s]) + q, head] * scale).softmax(0)
                out[int(ends[s]) + q, head] = weights @ values[rows, shared]
    return out


def fake_flash(*places: Any, **named: Any) -> tuple[torch.Tensor, ...]:
    """The operator behind it: the same, but for how a window is said, with what nobody reads."""
    *tensors, dropout, is_causal, wants_weights = places
    left, right = named.pop("window_size_left"), named.pop("window_size_right")
    assert (dropout, is_causal, wants_weights) == (0.0, left == -1, False)
    grouped = tensors[0].shape[1] != tensors[1].shape[1]
    out = fake_varlen(*tensors, window_size=(left, right), enable_gqa=grouped, **named)
    return out, torch.zeros(0)


@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("stage", ["mixed", "decoding"])
def test_attention_equals_a_plain_softmax(
    heads: int, window: int | None, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences at different stages, against softmax over the tokens that each query may see."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fake_flash)
    generator = torch.Generator().manual_seed(0)
    kv_states = torch.randn(1, 2, 2, 60, 8, generator=generator)
    chunks = (Chunk(3, 9, 9), Chunk(20, 7, 1), Chunk(30, 12, 5), Chunk(50, 1, 1))
    step = (
        Step.from_chunks(chunks, kv_states).only_last
        if stage == "decoding"
        else Step.from_chunks(chunks, kv_states)
    )
    queries = torch.randn(sum(chunk.new for chunk in step.chunks), heads, 8, generator=generator)
    wanted, row = torch.empty_like(queries), 0
    for chunk in step.host_chunks:
        for at in range(chunk.length - chunk.new, chunk.length):
            first = 0 if window is None else max(0, at - window + 1)
            for head in range(heads):
                seen = kv_states[
                    0, :, head * 2 // heads, chunk.start + first : chunk.start + at + 1
                ]
                weights = (seen[0] @ queries[row, head] * 0.3).softmax(0)
                wanted[row, head] = weights @ seen[1]
            row += 1
    for attend in (attend_by_row, attend_padded, attend_varlen, attend_flash):
        torch.testing.assert_close(attend(step, 0, queries, 0.3, window), wanted)


def test_an_attention_backend_that_works_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    shape = KvShape(layers=1, heads=2, head_size=16)
    assert (
        choose_attention(KvShape(layers=1, heads=2, head_size=8), 4, torch.float32, cpu)
        is attend_by_row
    )
    for attend in (attend_varlen, attend_flash):
        assert not _agrees(attend, shape, 4, torch.bfloat16, cpu), "no such kernel on a CPU"
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", fake_varlen)
    assert _agrees(attend_varlen, shape, 4, torch.float32, cpu)

    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        return fake_varlen(*arguments, **named | {"seqused_k": named["seqused_k"] - 1})

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", wrong)
    assert not _agrees(attend_varlen, shape, 4, torch.float32, cpu), "it forgets a token"


def test_a_step_knows_its_cache_positions() -> None:
    kv_states = torch.zeros(1, 2, 1, 40, 2)
    step = Step.from_chunks((Chunk(3, 5, 5), Chunk(20, 7, 1)), kv_states)
    assert step.slots.tolist() == [3, 4, 5, 6, 7, 26]
    assert step.last.tolist() == [4, 5]
    assert step.only_last.chunks == (Chunk(3, 5, 1), Chunk(20, 7, 1))
    states = torch.arange(24.0).view(6, 2, 1, 2)
    write(step, 0, *states.unbind(1))
    assert kv_states[0, 1, 0, 26].tolist() == states[5, 1, 0].tolist()
    assert kv_states[0, 0, 0, 3:8].equal(states[:5, 0, 0])
    assert kv_states.count_nonzero() == 23


@pytest.mark.parametrize("biased", [(), (16,), (16, 4)])
def test_packed_layers_compute_the_same(biased: tuple[int, ...]) -> None:
    layers = [nn.Linear(24, size, bias=size in biased) for size in (16, 8, 4)]
    packed = Linear.from_layers(*layers)
    inputs = torch.randn(3, 5, 24)
    with torch.inference_mode():
        wanted = [layer(inputs) for layer in layers]
        torch.testing.assert_close(packed(inputs), torch.cat(wanted, dim=-1))
        for found, want in zip(packed.each(inputs), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [5, 200])
def test_layers_apply_product_and_shift(rows: int, *, bias: bool) -> None:
    layer, inputs = nn.Linear(24, 8, bias=bias), torch.randn(rows, 24)
    with torch.inference_mode():
        found = Linear.from_layers(layer, product=3.0, shift=0.5)(inputs)
        wanted = 3 * inputs @ layer.weight.t() + (0.5 * layer.bias if bias else 0)
    torch.testing.assert_close(found, wanted)


@given(st.integers(1, 10_000))
def test_padded_row_counts_are_few(rows: int) -> None:
    run = rows_to_run(rows)
    assert rows <= run <= rows * 1.34
    assert rows_to_run(run) == run
    assert rows <= 16 or run <= rows * 1.24
    assert rows <= 128 or run <= rows * 1.13
    assert rows <= 512 or run <= rows * 1.07


def test_at_most_a_few_kernels_are_compiled() -> None:
    kernels = {rows_to_run(rows) for rows in range(1, 4097)}
    assert len(kernels) == 2 + 3 * 2 + 3 * 4 + 2 * 8 + 3 * 16
    assert len([rows for rows in kernels if rows <= FEW_ROWS]) == 18, "all that AVX2 needs"


WIDTHS = ("AVX2", "AVX512")


@pytest.mark.parametrize("capability", WIDTHS)
@pytest.mark.parametrize("shape", [(17, 24), (3, 11, 24), (1, 1, 24), (2, 300, 24)])
def test_padding_of_rows_changes_no_output(
    shape: tuple[int, ...], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    layer = nn.Linear(24, 10)
    inputs = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(Linear.from_layers(layer)(inputs), layer(inputs))


def test_rows_are_padded_where_packed_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear.from_layers(nn.Linear(8, 8))
    padded = {}
    for capability in WIDTHS:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda it=capability: it)
        padded[capability] = [linear.rows_to_run(rows) for rows in (17, 1000)]
    assert padded == {"AVX2": [20, 1000], "AVX512": [20, 1024]}


@pytest.mark.parametrize("capability", WIDTHS)
def test_every_cpu_capability_decodes_the_same(
    models: dict[str, Any], expected: Expected, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    for kind in ("llama-gqa-biased", "qwen2"):
        assert tokens(decode(models[kind], ragged(models[kind]))) == expected[kind]


def test_half_precision_is_not_packed() -> None:
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    packed = Linear.from_layers(layer)
    assert not packed.packed
    assert packed.weights[0].data_ptr() == layer.weight.data_ptr(), "a copy nobody needs"


def test_a_packed_twin_leaves_the_module_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    twin = packed_module(module)
    inputs = torch.randn(2, 8)
    with torch.inference_mode():
        torch.testing.assert_close(twin(inputs), module(inputs))
    assert twin is not module
    assert [type(m) for m in module.modules()].count(nn.Linear) == 2
    assert not any(isinstance(m, nn.Linear) for m in twin.modules())
    bare = nn.Sequential(nn.GELU(), nn.Tanh())
    assert packed_module(bare) is bare


@pytest.mark.parametrize("runs_first", ["twin", "model"])
def test_a_packed_twin_of_a_whole_model_generates(
    tiny_paths: dict[str, Path], runs_first: str
) -> None:
    """Both orders: transformers hooks a model's layers when it first runs."""
    path = str(tiny_paths["vicuna"])
    loaded = loading.load(path, revision=None, dtype="float32", device="cpu")
    twin = replace(loaded, model=packed_module(loaded.model))
    assert not any(isinstance(m, nn.Linear) for m in twin.model.modules())
    image = Image.effect_noise((200, 150), 80).convert("RGB")
    text = ChatPrompt(loaded.processor).render("What is it?")
    order = (twin, loaded, twin) if runs_first == "twin" else (loaded, twin, loaded)
    first, *others = [stock_generate(one, [image], [text], 8) for one in order]
    assert others == [first, first]


def test_unsupported_models_are_recognised(
    models: dict[str, Any], loaded_models: dict[str, LoadedModel]
) -> None:
    assert all(unsupported(model) is None for model in models.values())
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

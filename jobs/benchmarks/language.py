"""Language only: a ragged workload through our decoder and through stock transformers.

The model is a random Llama of 58 million parameters; prompts are token ids for stock and their
embeddings for us. End-of-sequence tokens are off: every request has its own fixed answer length, so
all do the same work, and whose tokens are not those of stock `generate`, one by one, stops the
benchmark. Everybody has the same threads, float32 and SDPA. Packing layers and allocating KV caches
is not timed, for anybody.

The ways of stock `generate`, one by one and in batches, run once on a third of the requests; those
that are best, without packed layers and with, then run in turn with us on all of them, and so does
one by one. Continuous batching runs once on all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.decoder import Completion
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.models.base import Prompt
from gc2ray.models.layers.linear import packed_module
from gc2ray.models.llama import LanguageModel
from gc2ray.models.shape import TextModel, cached_reads
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.inputs import conditions
from jobs.benchmarks.support.peers import (
    BATCH_TOKENS,
    PAD,
    Answering,
    Batches,
    Tokens,
    continuous,
    one_by_one,
)
from jobs.benchmarks.support.ragged import RaggedRequest, ragged_requests
from jobs.benchmarks.support.roofline import FLOAT32, PACKED_GAIN, Machine, Stage, measured_machine
from jobs.benchmarks.support.timing import Times, in_turn, tell, time_ratios

WIDTH, LAYERS, HEADS, FFN, VOCABULARY = 512, 8, 8, 1376, 32_000
SPREAD = 0.04
"""Standard deviation of the weights: at 0.02, Llama's, answers soon repeat one token."""
BATCHES = (Batches(8, by_length=False), *(Batches(size, by_length=True) for size in (4, 8, 16)))
ONE_BY_ONE = "one by one"
MODES: dict[str, Answering] = {
    ONE_BY_ONE: one_by_one,
    **{batches.name: batches.answer for batches in BATCHES},
}
"""Batch sizes of stock `generate`."""
LIMITS = DecodeLimits(kv_tokens=16_384, prefill_tokens=2048)
TURNS, TRIAL = 3, 3
"""Turns of all requests; of how many requests one is tried to choose what runs in turn."""
SAME = 0.95
EQUAL_LAYERS, TOTAL = 1.9, 3.2
"""Goals: how much faster we are than stock at its best, with equal linear layers and without."""


def run() -> list[Line]:
    """The workload of 64 requests."""
    return measure(random_llama(), ragged_requests(VOCABULARY), measured_machine())


def random_llama(width: int = WIDTH, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> Any:
    """A Llama that never ends an answer by itself."""
    config_class: Any = LlamaConfig  # its signature misses a field that it takes
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * FFN // WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        initializer_range=SPREAD,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@dataclass(eq=False)
class _Recorded:
    """A way to answer the requests, and its last answers."""

    answer: Callable[[], Tokens]
    found: Tokens = field(default_factory=list)

    def __call__(self) -> None:
        self.found = self.answer()


@dataclass(frozen=True, eq=False)
class _Ours:
    """Our decoder, its layers packed and its KV cache allocated."""

    model: Any
    decoder: ContinuousBatchDecoder
    finished: dict[int, Completion] = field(default_factory=dict)

    @staticmethod
    def over(model: Any) -> _Ours:
        return _Ours(model, ContinuousBatchDecoder(LanguageModel(model), LIMITS, eos=()))

    @torch.inference_mode()
    def answer(self, requests: Sequence[RaggedRequest]) -> Tokens:
        self.finished.clear()
        table = self.model.get_input_embeddings()
        for tag, request in enumerate(requests):
            prompt, sampling = (
                Prompt(table(request.prompt)),
                GenerationConfig(max_new_tokens=request.new_tokens),
            )
            while not self.decoder.submit(tag, prompt, sampling):
                self._step()
        while len(self.decoder):
            self._step()
        return [list(self.finished[tag].token_ids) for tag in range(len(requests))]

    def _step(self) -> None:
        self.finished.update({found.tag: found for found in self.decoder.step()})

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the last run's time: reading prompts, and writing answers."""
        prefill = sum(found.prefill_ns for found in self.finished.values())
        generate = sum(found.generate_ns for found in self.finished.values())
        whole = prefill + generate
        return {"share_prefill": prefill / whole, "share_generate": generate / whole}


def measure(
    model: Any, requests: Sequence[RaggedRequest], machine: Machine, turns: int = TURNS
) -> list[Line]:
    """Compare on some requests.

    Raises:
        RuntimeError: Somebody's tokens are not those of stock `generate`, one by one.
    """
    packed, ours = packed_module(model), _Ours.over(model)
    trials = _trials(model, packed, requests[::TRIAL])
    best, equal = (min(trial, key=lambda mode: trial[mode].cpu[0]) for trial in trials)
    stock, rival = f"stock, {best}", f"stock with packed layers, {equal}"
    name = f"ours, {LIMITS.kv_tokens} KV tokens, {LIMITS.prefill_tokens} prompt tokens a step"
    works = {
        f"stock, {ONE_BY_ONE}": _Recorded(partial(one_by_one, model, requests)),
        stock: _Recorded(partial(MODES[best], model, requests)),
        rival: _Recorded(partial(MODES[equal], packed, requests)),
        name: _Recorded(partial(ours.answer, requests)),
    }
    wanted = works[f"stock, {ONE_BY_ONE}"]

    def same() -> dict[str, int]:
        return {who: _same(who, work.found, wanted.found) for who, work in works.items()}

    times = in_turn(works, turns, check=same)
    scale = _Scale.of(model, requests, machine)
    counts = same()
    lines = [
        Line(who, scale.figures(taken) | {"same_answers": counts[who]})
        for who, taken in times.items()
    ]
    lines[-1].figures.update(ours.shares)
    return [
        machine.line(),
        scale.line(),
        *lines,
        _continuous_line(model, requests, wanted.found, scale),
        *_trial_lines(trials, _Scale.of(model, requests[::TRIAL], machine)),
        *_ratios(times, (f"stock, {ONE_BY_ONE}", stock, rival), name, machine),
    ]


def _trials(
    model: Any, packed: Any, requests: Sequence[RaggedRequest]
) -> tuple[dict[str, Times], dict[str, Times]]:
    """The ways of stock `generate`, without packed layers and with, once each."""

    def tried(who: Any) -> dict[str, Times]:
        return in_turn({mode: partial(go, who, requests) for mode, go in MODES.items()}, turns=1)

    return tried(model), tried(packed)


def _trial_lines(trials: Sequence[Mapping[str, Times]], scale: _Scale) -> list[Line]:
    kinds = zip(("stock", "stock with packed layers"), trials, strict=True)
    return [
        Line(f"{kind}, {mode} (a third of the requests, 1 run)", scale.figures(taken))
        for kind, trial in kinds
        for mode, taken in trial.items()
    ]


def _same(who: str, found: Tokens, wanted: Tokens) -> int:
    """Requests that were answered as wanted."""
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    if same < SAME * len(wanted):
        raise RuntimeError(f"{who}: {same} of {len(wanted)} answers are as one by one")
    return same


@dataclass(frozen=True)
class _Scale:
    """What the workload needs, and what the machine would need for it."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    prefill: Stage
    decode: Stage
    machine: Machine
    conditions: str

    @staticmethod
    def of(model: Any, requests: Sequence[RaggedRequest], machine: Machine) -> _Scale:
        """Decoding reads the weights once a step of the longest answer: no order beats it."""
        text = TextModel.from_config(model.config)
        sizes = [(len(request.prompt), request.new_tokens) for request in requests]
        steps = max(new for _, new in sizes) - 1
        cache = text.cached_numbers * sum(cached_reads(*size) for size in sizes)
        return _Scale(
            requests=len(sizes),
            prompt_tokens=sum(length for length, _ in sizes),
            new_tokens=sum(new for _, new in sizes),
            prefill=Stage(sum(text.needed_prefill(length) for length, _ in sizes), 0),
            decode=Stage(
                sum(text.decode(*size) for size in sizes),
                FLOAT32 * (steps * text.step_weights + cache),
            ),
            machine=machine,
            conditions=conditions(model),
        )

    @property
    def ideal_seconds(self) -> float:
        return self.machine.ideal_seconds((self.prefill, self.decode))

    def line(self) -> Line:
        tokens = f"{self.prompt_tokens} prompt and {self.new_tokens} new tokens"
        return Line(
            f"needed by {self.requests} requests, {tokens} ({self.conditions})",
            {
                "prefill_gflop": self.prefill.flops / 1e9,
                "decode_gflop": self.decode.flops / 1e9,
                "decode_gb": self.decode.bytes_read / 1e9,
                "ideal_s": self.ideal_seconds,
            },
        )

    def figures(self, times: Times) -> dict[str, float]:
        """Seconds are of CPU time, but for `wall_s`; FLOP/s count what is needed, for everybody."""
        seconds, flops = median(times.cpu), self.prefill.flops + self.decode.flops
        return {
            "cpu_s": seconds,
            "wall_s": median(times.wall),
            "requests_per_s": self.requests / seconds,
            "tokens_per_s": self.new_tokens / seconds,
            "gflops": flops / seconds / 1e9,
            "share_of_gemm": flops / seconds / self.machine.flops_per_s,
            "share_of_roofline": self.ideal_seconds / seconds,
            "runs": len(times.cpu),
        }


def _continuous_line(
    model: Any, requests: Sequence[RaggedRequest], wanted: Tokens, scale: _Scale
) -> Line:
    found, times = continuous(model, requests, LIMITS.kv_tokens)
    limits = f"{LIMITS.kv_tokens} KV tokens, {BATCH_TOKENS} tokens a step, 1 run"
    name = f"transformers continuous batching ({limits})"
    tell(name, times.wall[0])
    same = _same(name, found, wanted)
    return Line(name, scale.figures(times) | {"same_answers": same})


def _ratios(
    times: Mapping[str, Times], stock: Sequence[str], ours: str, machine: Machine
) -> list[Line]:
    """Ours against ways of stock, the last with equal layers; goals hold for wall and CPU time."""
    *plain, equal = stock
    lines = []
    for who in dict.fromkeys(plain):
        ratios = time_ratios(times[who], times[ours])
        met = goal(f"at least {TOTAL:g}x", met=min(ratios.values()) >= TOTAL)
        if machine.packed_gain < PACKED_GAIN:
            met = f"at least {TOTAL:g}x: not held, prepacked is {machine.packed_gain:.2f}x plain"
        lines.append(Line(f"ours against {who}", ratios, met))
    ratios = time_ratios(times[equal], times[ours])
    met = goal(f"at least {EQUAL_LAYERS:g}x", met=min(ratios.values()) >= EQUAL_LAYERS)
    return [*lines, Line(f"ours against {equal}", ratios, met)]

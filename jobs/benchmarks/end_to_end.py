"""JPEG bytes to answers: our engine at several retentions, against stock `generate`.

The model is random, with a 7B's geometry and proportions. Stock is uncompressed, with its best
batch size, once as it is and once with the same prepacked layers as ours; its preprocessing is
timed, as ours is. Rows come in order of their visual tokens, which spares stock most padding. Both
write 32 tokens for every row: end-of-sequence tokens are off. The same torch threads for all,
float32, SDPA; our engine decodes images on one thread more, so goals are held against CPU time as
well as the clock. With as many torch threads as cores that thread has no core of its own.

Stock's batch size is chosen once, on a quarter of the rows, without packed layers. Loading models,
packing layers and allocating KV caches is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.core.stats import STAGES
from gc2ray.engine.engine import Engine
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.hf_reference import stock_generate
from gc2ray.models.layers.linear import packed_module
from gc2ray.models.shape import LLAVA_7B, ModelShape
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.inputs import XGA, conditions, model_in_proportion, opened, photographs
from jobs.benchmarks.support.roofline import (
    FLOAT32,
    Machine,
    Stage,
    answering_stages,
    measured_machine,
)
from jobs.benchmarks.support.timing import Times, Work, in_turn, time_ratios
from jobs.support.answering import answers_in_order

RETENTIONS = (1.0, 0.5, 0.25, 0.1)
GOALS = {1.0: 1.4, 0.1: 10.0}
"""How many times as fast as uncompressed stock."""
QUESTION = "What is in the picture?"
NEW_TOKENS, TURNS = 32, 3
BATCHES, CLEARLY = (1, 2, 4, 8), 1.1
SAME = 0.95
CLUSTER = Cluster(image_threads=1)


def run() -> list[Line]:
    """16 photographs as they are, and at 1024x768."""
    data = [*photographs(), *photographs(XGA)]
    return measure(model_in_proportion(), data, measured_machine())


@dataclass(eq=False)
class _Ours:
    """An engine at one retention, and its last answers."""

    retention: float
    engine: Engine
    data: Sequence[bytes]
    answers: list[Answer] = field(default_factory=list)

    @staticmethod
    def at(retention: float, loaded: LoadedModel, data: Sequence[bytes]) -> _Ours:
        recipe = {
            "model": {"path": "random", "dtype": "float32"},
            "compression": {"method": "globalcom2", "retention": retention},
            "generation": {"max_new_tokens": NEW_TOKENS},
            "input": {"uri": "-", "prompt": {"constant": QUESTION}},
        }
        return _Ours(retention, Engine(loaded, parse_recipe(recipe), CLUSTER), data)

    @property
    def name(self) -> str:
        return f"ours, retention {self.retention:g}"

    def __call__(self) -> None:
        self.engine.clear_cache()  # or it would remember the images of the turn before
        requests = [
            Request(f"bench#{row}", "bench", row, (ImageRef(item),), (QUESTION,))
            for row, item in enumerate(self.data)
        ]
        self.answers = answers_in_order(self.engine, requests)

    @property
    def tokens(self) -> list[list[int]]:
        return [list(answer.token_ids) for answer in self.answers]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the stages' busy time; images are decoded beside the others."""
        spent = {stage: sum(answer.stage_ns[stage] for answer in self.answers) for stage in STAGES}
        return {f"share_{name}": taken / sum(spent.values()) for name, taken in spent.items()}


@dataclass(eq=False)
class _Stock:
    """Stock `generate` in batches, and the tokens it wrote last."""

    name: str
    loaded: LoadedModel
    data: Sequence[bytes]
    batch: int
    tokens: list[list[int]] = field(default_factory=list)

    def __call__(self) -> None:
        text = ChatPrompt(self.loaded.processor).render(QUESTION)
        self.tokens = []
        for first in range(0, len(self.data), self.batch):
            images = [opened(item) for item in self.data[first : first + self.batch]]
            texts = [text] * len(images)
            self.tokens += stock_generate(self.loaded, images, texts, NEW_TOKENS)


def measure(
    loaded: LoadedModel, data: Sequence[bytes], machine: Machine, turns: int = TURNS
) -> list[Line]:
    """Compare on some images.

    Args:
        loaded: The model; it must not end answers by itself.
        data: Image files.
        machine: Whose roofline it is.
        turns: Turns of what is compared.

    Raises:
        RuntimeError: Somebody's tokens at 1.0 are not stock's, or too few.
    """
    packed = replace(loaded, model=packed_module(loaded.model))
    data = _by_length(loaded, data)
    engines = [_Ours.at(retention, loaded, data) for retention in RETENTIONS]
    batch = _best_batch(loaded, data[::4])
    stock = _Stock(f"stock, batches of {batch}", loaded, data, batch)
    equal = _Stock(f"stock with packed layers, batches of {batch}", packed, data, batch)
    contestants: list[_Stock | _Ours] = [stock, equal, *engines]
    works: dict[str, Work] = {entry.name: entry for entry in contestants}

    def same() -> dict[str, int]:
        return _same(contestants, stock.tokens)

    times = in_turn(works, turns, check=same)
    whole = _Scale.of(loaded, engines[0].answers, machine)
    figures = {entry.name: whole.figures(times[entry.name]) for entry in (stock, equal)}
    for ours in engines:
        scale = _Scale.of(loaded, ours.answers, machine)
        figures[ours.name] = scale.figures(times[ours.name]) | ours.shares
    for name, count in same().items():
        figures[name]["same_answers"] = count
    return [
        machine.line(),
        _proportions(loaded, engines[0].answers),
        *(Line(name, found) for name, found in figures.items()),
        *_ratios(times, stock, equal, engines),
    ]


def _by_length(loaded: LoadedModel, data: Sequence[bytes]) -> list[bytes]:
    """Images in order of their visual tokens."""
    short = _Ours.at(min(RETENTIONS), loaded, data)
    short()  # warms up, too
    order = sorted(range(len(data)), key=lambda row: short.answers[row].visual_tokens_full or 0)
    return [data[row] for row in order]


def _best_batch(loaded: LoadedModel, data: Sequence[bytes]) -> int:
    """Stock's best batch size; larger ones are not tried once one is clearly slower."""
    best, best_seconds = 0, math.inf
    for size in BATCHES:
        name = f"choice of stock's batch size: {size}"
        seconds = in_turn({name: _Stock(name, loaded, data, size)}, turns=1)[name].cpu[0]
        if seconds > CLEARLY * best_seconds:
            break
        if seconds < best_seconds:
            best, best_seconds = size, seconds
    return best


def _same(contestants: Sequence[_Stock | _Ours], wanted: list[list[int]]) -> dict[str, int]:
    """Per contestant that compresses nothing, the rows it answered as wanted."""
    same = {}
    for entry in contestants:
        if any(len(tokens) != NEW_TOKENS for tokens in entry.tokens):
            raise RuntimeError(f"{entry.name}: not all answers have {NEW_TOKENS} tokens")
        if isinstance(entry, _Ours) and entry.retention < 1:
            continue
        same[entry.name] = sum(a == b for a, b in zip(entry.tokens, wanted, strict=True))
        if same[entry.name] < SAME * len(wanted):
            raise RuntimeError(f"{entry.name}: {same[entry.name]} answers are stock's")
    return same


@dataclass(frozen=True)
class _Scale:
    """What rows need at a retention, and what the machine would need for it."""

    rows: int
    tokens: float
    stages: tuple[Stage, ...]
    machine: Machine

    @staticmethod
    def of(loaded: LoadedModel, answers: Sequence[Answer], machine: Machine) -> _Scale:
        """From the answers at a retention."""
        kept = sum(answer.visual_tokens_kept or 0 for answer in answers)
        stages = answering_stages(loaded.model.config, answers, NEW_TOKENS)
        return _Scale(len(answers), kept / len(answers), stages, machine)

    def figures(self, times: Times) -> dict[str, float]:
        """Rates and shares are per CPU second; FLOP/s count what is needed, for everybody."""
        seconds, flops = median(times.cpu), sum(stage.flops for stage in self.stages)
        return {
            "visual_tokens_per_row": self.tokens,
            "wall_s": median(times.wall),
            "cpu_s": seconds,
            "images_per_s": self.rows / seconds,
            "images_per_s_wall": self.rows / median(times.wall),
            "tokens_per_s": self.rows * NEW_TOKENS / seconds,
            "gflops": flops / seconds / 1e9,
            "share_of_gemm": flops / seconds / self.machine.flops_per_s,
            "share_of_roofline": self.machine.ideal_seconds(self.stages) / seconds,
            "runs": len(times.cpu),
        }


def _proportions(loaded: LoadedModel, answers: Sequence[Answer]) -> Line:
    """What parts cost when nothing is compressed, here and in the 7B, on the same rows."""
    config = loaded.model.config
    shape = ModelShape.from_config(config, FLOAT32)
    tower, seven = shape.tower, LLAVA_7B.tower
    gflop = sum(sum(_uncompressed(shape, answer)) for answer in answers) / len(answers) / 1e9
    figures = {
        "parameters_m": sum(p.numel() for p in loaded.model.parameters()) / 1e6,
        "gflop_per_row": gflop,
        "tower_and_projector": _vision_share(shape, answers),
        "tower_and_projector_7b": _vision_share(LLAVA_7B, answers),
        "tower_needed": tower.needed(1) / tower.whole(1),
        "tower_needed_7b": seven.needed(1) / seven.whole(1),
    }
    what = f"model ({conditions(loaded.model)}): shares of {len(answers)} uncompressed rows' work"
    return Line(what, figures)


def _vision_share(shape: ModelShape, answers: Sequence[Answer]) -> float:
    parts = [_uncompressed(shape, answer) for answer in answers]
    return sum(vision for vision, _ in parts) / sum(map(sum, parts))


def _uncompressed(shape: ModelShape, answer: Answer) -> tuple[int, int]:
    """FLOPs of tower and projector, and of the language model, run as they are."""
    full, prompt = answer.visual_tokens_full or 0, answer.prompt_tokens or 0
    tower, text = shape.tower, shape.text
    vision = tower.whole(_views(answer)) + tower.projector(full)
    return vision, text.prefill(prompt) + text.decode(prompt, NEW_TOKENS)


def _views(answer: Answer) -> int:
    return sum(len(views) for views in answer.kept_per_view or ())


def _ratios(
    times: Mapping[str, Times], stock: _Stock, equal: _Stock, engines: Sequence[_Ours]
) -> list[Line]:
    lines = []
    for ours in engines:
        against = time_ratios(times[stock.name], times[ours.name])
        goals = _goals(GOALS.get(ours.retention), against)
        lines.append(Line(f"{ours.name}, against {stock.name}", against, goals))
        equal_layers = time_ratios(times[equal.name], times[ours.name])
        lines.append(Line(f"{ours.name}, against {equal.name}", equal_layers))
    return lines


def _goals(floor: float | None, against: Mapping[str, float]) -> str:
    """A goal by the clock, and by CPU time."""
    if floor is None:
        return ""
    by_clock = goal(f"at least {floor:g}x by the clock", met=against["ratio_wall"] >= floor)
    return f"{by_clock}; {goal('by CPU time', met=against['ratio_cpu'] >= floor)}"

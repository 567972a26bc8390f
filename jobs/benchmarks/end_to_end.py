"""JPEG bytes to answers: our engine at several retentions, against stock `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median

from gc2ray.config import Cluster, parse_recipe
from gc2ray.engine import Engine
from gc2ray.families.stock import stock_generate
from gc2ray.prompts import ChatPrompt
from gc2ray.records import Answer, ImageRef, Request
from jobs.answering import answers_in_order
from jobs.benchmarks import Line
from jobs.benchmarks.inputs import XGA, opened, photographs, tiny_model
from jobs.benchmarks.timing import Times, Work, in_turn, median_ratio

RETENTIONS = (1.0, 0.5, 0.25, 0.1)
QUESTION = "What is in the picture?"
NEW_TOKENS, STOCK_BATCH, TURNS = 16, 8, 3
SAME_ANSWERS = 0.9
"""Share of answers at 1.0 that must be stock's; batches round differently, so not all need be."""


def run() -> list[Line]:
    """Photographs, every other one at 1024x768."""
    data = [*photographs()[::2], *photographs(XGA)[1::2]]
    engines = {retention: _engine(retention) for retention in RETENTIONS}
    answers = {retention: _answers(engine, data) for retention, engine in engines.items()}
    texts = [answer.answer for answer in answers[1.0]]
    same = sum(a == b for a, b in zip(texts, _stock_answers(data), strict=True))
    if same < SAME_ANSWERS * len(data):
        raise RuntimeError(f"only {same} of {len(data)} answers at 1.0 are stock's")
    works: dict[str, Work] = {f"{r:g}": partial(_answers, engines[r], data) for r in RETENTIONS}
    times = in_turn(works | {"stock": partial(_stock_answers, data)}, TURNS)
    stock = {
        "rows_per_s": len(data) / median(times["stock"].wall),
        "same_answers_as_ours_at_1": same,
    }
    return [
        Line(f"stock transformers, {len(data)} rows in batches of {STOCK_BATCH}", stock),
        *(
            Line(f"ours, retention {r:g}", _figures(answers[r], times[f"{r:g}"], times["stock"]))
            for r in RETENTIONS
        ),
    ]


def _engine(retention: float) -> Engine:
    recipe = {
        "model": {"path": "tiny", "dtype": "float32"},
        "compression": {"method": "globalcom2", "retention": retention},
        "generation": {"max_new_tokens": NEW_TOKENS},
        "input": {"uri": "-", "prompt": {"constant": QUESTION}},
    }
    return Engine(tiny_model(), parse_recipe(recipe), Cluster())


def _answers(engine: Engine, data: Sequence[bytes]) -> list[Answer]:
    """Answers in the order of the rows.

    Raises:
        RuntimeError: A row was not answered.
    """
    requests = [
        Request(f"bench#{row}", "bench", row, (ImageRef(item),), (QUESTION,))
        for row, item in enumerate(data)
    ]
    return answers_in_order(engine, requests)


def _stock_answers(data: Sequence[bytes]) -> list[str]:
    chat = ChatPrompt(tiny_model().processor)
    answers: list[str] = []
    for first in range(0, len(data), STOCK_BATCH):
        images = [opened(item) for item in data[first : first + STOCK_BATCH]]
        texts = [chat.render(QUESTION)] * len(images)
        tokens = stock_generate(tiny_model(), images, texts, NEW_TOKENS)
        answers += [chat.decode(tuple(row)) for row in tokens]
    return answers


def _figures(answers: Sequence[Answer], ours: Times, stock: Times) -> dict[str, float]:
    return {
        "ratio_wall": median_ratio(stock.wall, ours.wall),
        "ratio_cpu": median_ratio(stock.cpu, ours.cpu),
        "rows_per_s": len(answers) / median(ours.wall),
        "tokens_per_row": sum(a.visual_tokens_kept or 0 for a in answers) / len(answers),
    }

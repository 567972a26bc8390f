"""One image, many questions: what sharing the image and the beginning of its prompts is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.records import Answer, ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.engine.request_state import RequestState
from gc2ray.models.base import Prompt
from jobs.benchmarks import Line
from jobs.benchmarks.support.inputs import XGA, model_in_proportion, photographs
from jobs.benchmarks.support.timing import Work, in_turn, median_ratio
from jobs.support.answering import answers_in_order

IMAGES, QUESTIONS, NEW_TOKENS, TURNS = 2, 10, 16, 3
RETENTIONS = (1.0, 0.1)
ASKED = "Question {}: what is in the picture?"
SAME = 0.95
"""Share of answers that must be the same; batches round differently, so not all need be."""


class _ImagesOnly(Engine):
    """Shares images, and computes every prompt from its beginning."""

    def _submitted(self, row: RequestState, prompt: Prompt) -> bool:
        return super()._submitted(row, replace(prompt, prefix_key=None))


def run() -> list[Line]:
    """Nothing shared: every question has an image of its own, with the same pixels."""
    data = photographs(XGA)[:IMAGES]
    apart = _requests([[image + bytes([q]) for q in range(QUESTIONS)] for image in data])
    shared = _requests([[image] * QUESTIONS for image in data])
    modes: dict[str, Work] = {}
    for retention in RETENTIONS:
        whole, images = _engine(Engine, retention), _engine(_ImagesOnly, retention)
        _check(_answers(whole, apart), _answers(whole, shared))
        modes |= {
            f"apart {retention:g}": partial(_answers, whole, apart),
            f"images {retention:g}": partial(_answers, images, shared),
            f"both {retention:g}": partial(_answers, whole, shared),
        }
    times = {name: taken.cpu for name, taken in in_turn(modes, TURNS).items()}
    rows = IMAGES * QUESTIONS
    lines = []
    for r in RETENTIONS:
        apart_s, images_s, both_s = (times[f"{mode} {r:g}"] for mode in ("apart", "images", "both"))
        figures = {
            "apart_rows_per_s": rows / median(apart_s),
            "images_shared": median_ratio(apart_s, images_s),
            "beginnings_too": median_ratio(apart_s, both_s),
        }
        lines.append(Line(f"{IMAGES} images, {QUESTIONS} questions each, retention {r:g}", figures))
    pays = {
        mode: median_ratio(times[f"{mode} 1"], times[f"{mode} 0.1"])
        for mode in ("apart", "images", "both")
    }
    return [*lines, Line("retention 0.1 against 1.0", pays)]


def _engine(kind: type[Engine], retention: float) -> Engine:
    recipe = {
        "model": {"path": "random", "dtype": "float32"},
        "compression": {"method": "globalcom2", "retention": retention},
        "generation": {"max_new_tokens": NEW_TOKENS},
        "input": {"uri": "-", "prompt": {"constant": "-"}},
    }
    return kind(model_in_proportion(), parse_recipe(recipe), Cluster(image_threads=1))


def _requests(images: Sequence[Sequence[bytes]]) -> list[Request]:
    flat = [(data, ASKED.format(q)) for group in images for q, data in enumerate(group)]
    return [
        Request(f"bench#{row}", "bench", row, (ImageRef(data),), (text,))
        for row, (data, text) in enumerate(flat)
    ]


def _answers(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    engine.clear_cache()
    return answers_in_order(engine, requests)


def _check(apart: Sequence[Answer], shared: Sequence[Answer]) -> None:
    same = sum(a.token_ids == b.token_ids for a, b in zip(apart, shared, strict=True))
    if same < SAME * len(apart):
        raise RuntimeError(f"{same} of {len(apart)} answers are the same when images are shared")

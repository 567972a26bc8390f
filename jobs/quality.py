"""How accuracy falls with visual tokens, on the demo's models: `make quality`.

Answers the test rows of each model with every method at every retention, with smaller images, with
controls, with every score, with two images a row, and with GlobalCom² packed in other ways; chooses
the softmax temperature of each score on validation rows first. Writes `docs/quality.json`, the
plots, and the part of `docs/quality.md` between its marks, after each model; prints what it
measures as it goes. Nothing is tuned on test rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gc2ray.core.config.compression import Score
from gc2ray.core.intervals import difference, interval
from gc2ray.core.metrics.scores import score
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import DemoRow, Split, demo_rows
from jobs.quality_curve import page
from jobs.quality_curve.models import MODELS, DemoModel
from jobs.quality_curve.plan import Plan
from jobs.quality_curve.plot import plot
from jobs.quality_curve.points import (
    TEMPERATURE,
    Data,
    Measured,
    Point,
    load,
    measure_all,
    shares_far_from_uniform,
)
from jobs.quality_curve.results import Results, plain
from jobs.quality_curve.several import rows_with_images
from jobs.support.machine import cpu_name

ROOT = Path(__file__).parents[1]
TEMPERATURES = (10.0, 1.0, 3.0, 30.0, 100.0)
TUNED_AT = 0.1
"""Retention at which temperatures are compared."""
SHARE_ROWS = 500
BOTH = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m jobs.quality", description=__doc__)
    parser.add_argument("--model", choices=[BOTH, *MODELS], default=BOTH)
    parser.add_argument("--weights", type=Path, help="directory with other weights of the model")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--into", type=Path, default=ROOT, help="folder with docs/")
    parser.add_argument(
        "--packings", action="store_true", help="measure policies of packing only; writes nothing"
    )
    chosen = parser.parse_args(arguments)
    models = list(MODELS.values()) if chosen.model == BOTH else [MODELS[chosen.model]]
    if chosen.weights is not None:
        if len(models) > 1:
            parser.error("--weights are those of one model: name it by --model")
        models = [replace(models[0], directory=chosen.weights)]
    for model in models:
        if not (model.directory / "config.json").is_file():
            parser.error(f"--model {model.name}: no model in {model.directory}")
    if not (chosen.packings or (chosen.into / "docs" / "quality.md").is_file()):
        parser.error(f"--into {chosen.into}: no docs/quality.md to write into")
    for model in models:
        test = Data(model, Split.TEST, chosen.rows)
        if chosen.packings:
            print(page.packings(measure_packings(test, chosen.processes)))
            continue
        validation = Data(model, Split.VALIDATION, chosen.validation_rows)
        _write(model, document(test, validation, chosen.processes), chosen.into)
    return 0


@dataclass(frozen=True)
class Chosen:
    """A score's temperature.

    Attributes:
        temperature: The one that is used.
        tried: What others change against the paper's.
    """

    temperature: float
    tried: tuple[dict[str, float], ...]


def document(test: Data, validation: Data, processes: int) -> dict[str, Any]:
    """All that `docs/quality.json` has of a model."""
    chosen = choose_temperatures(validation, processes)
    default = chosen[test.model.default_score]
    temperatures = {name: found.temperature for name, found in chosen.items()}
    tried = {name: list(found.tried) for name, found in chosen.items()}
    return {
        **measure(test, temperatures, processes),
        "temperature": default.temperature,
        "temperatures": tried[test.model.default_score],
        "score_temperatures": {
            name: {
                "used": temperatures[name],
                "tried": tried[name],
                "far_from_uniform": far_from_uniform(test, name),
            }
            for name in test.model.scores
        },
        "validation_rows": validation.rows,
        "hardware": f"{os.cpu_count()} cores of an {cpu_name()}",
        "date": datetime.now(UTC).date().isoformat(),
    }


def choose_temperatures(data: Data, processes: int) -> dict[Score, Chosen]:
    """Of each score the paper's, unless another is better beyond doubt; then the best of those."""
    model, usual = data.model, data.model.default_score
    points = {
        (name, t): Point("globalcom2", TUNED_AT, t, score=None if name == usual else name)
        for name in model.scores
        for t in TEMPERATURES
    }
    rows = _rows(data)
    right = {m.point: _right(rows, m) for m in measure_all(data, [*points.values()], processes)}
    chosen = {}
    for name in model.scores:
        tried: list[dict[str, float]] = []
        best, best_mean = TEMPERATURE, 0.0
        for temperature in TEMPERATURES[1:]:
            papers = right[points[name, TEMPERATURE]]
            found = difference(right[points[name, temperature]], papers)
            tried.append({"temperature": temperature, **plain(found)})
            print(f"{name}: temperature {temperature:g} against {TEMPERATURE:g}: {found}")
            if found.low > 0 and found.mean > best_mean:
                best, best_mean = temperature, found.mean
        chosen[name] = Chosen(best, tuple(tried))
    return chosen


def measure(data: Data, temperatures: Mapping[Score, float], processes: int) -> dict[str, Any]:
    """Everything on the rows of `data` that can be compared."""
    plan = Plan(data.model, temperatures)
    results = _results(data, plan, plan.points(), processes)
    found = {
        "rows": data.rows,
        "points": results.curve(),
        "differences": results.differences(),
        "downsampled": results.downsampled(),
        "scores": results.scores(),
        "topics": results.topics(),
        "packings": results.packings(),
        "several": results.several(),
        "far_from_uniform": far_from_uniform(data, data.model.default_score),
    }
    return {**found, "markers": results.markers()} if data.model.has_markers else found


def measure_packings(data: Data, processes: int) -> list[dict[str, Any]]:
    """The policies of packing alone, at the paper's temperature."""
    plan = Plan(data.model, dict.fromkeys(data.model.scores, TEMPERATURE))
    return _results(data, plan, plan.packings(), processes).packings()


def far_from_uniform(data: Data, score: Score) -> dict[str, float]:
    """See `shares_far_from_uniform`; by temperature as text, as JSON has it."""
    loaded = load(str(data.model.directory), score)
    rows = _rows(replace(data, rows=min(data.rows, SHARE_ROWS)))
    shares = shares_far_from_uniform(loaded, rows, TUNED_AT, sorted(TEMPERATURES))
    return {f"{temperature:g}": share for temperature, share in shares.items()}


def _results(data: Data, plan: Plan, points: Sequence[Point], processes: int) -> Results:
    """Measure and score points, and print each as it comes."""
    rows = _rows(data)
    measured, right = dict[Point, Measured](), dict[Point, np.ndarray]()
    for done in measure_all(data, points, processes):
        measured[done.point], right[done.point] = done, _right(rows, done)
        found = f"{interval(right[done.point])}, {done.tokens:.0f} tokens"
        print(f"{data.model.name}, {_name(done.point)}: {found}", flush=True)
    return Results(plan, rows, measured, right)


def _name(point: Point) -> str:
    """A point as it is printed: method, retention, and what is not the default."""
    usual = Point(point.method)
    settings = ("positions", "newlines", "markers", "score", "budget")
    others = [getattr(point, s) for s in settings if getattr(point, s) != getattr(usual, s)]
    others += [f"{point.images} images"] if point.images > 1 else []
    return ", ".join([f"{point.method} at {point.retention:g}", *others])


def _rows(data: Data) -> list[DemoRow]:
    return list(demo_rows(data.split, data.rows, opened_photos()))


def _right(rows: Sequence[DemoRow], measured: Measured) -> np.ndarray:
    answered = [asked.row for asked in rows_with_images(rows, measured.point.images)]
    return score("exact_match", measured.answers, [[row.question.answer] for row in answered])


def _write(model: DemoModel, measured: Mapping[str, Any], into: Path) -> None:
    """Replace what is known of a model, and leave what is known of others."""
    folder = into / "docs"
    path = folder / "quality.json"
    documents = json.loads(path.read_text()) if path.exists() else {}
    documents[model.name] = measured
    path.write_text(json.dumps(documents, indent=1) + "\n")
    plot(measured["points"], folder / model.plot)
    text = folder / "quality.md"
    text.write_text(page.inserted(text.read_text(), documents))


if __name__ == "__main__":
    sys.exit(main())

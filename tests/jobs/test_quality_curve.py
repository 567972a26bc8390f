"""`make quality`: the rule for the temperature, the controls, and what the page is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import canvas_geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.packing import Packing
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.views import Views
from gc2ray.core.config.recipe import Recipe
from gc2ray.demo.rows import Split
from jobs import quality
from jobs.quality_curve import page, points, verdicts
from jobs.quality_curve.controls import Blind, ForeignScores
from jobs.quality_curve.models import LLAVA_NEXT, MODELS, SMOLVLM
from jobs.quality_curve.plot import COLOURS, plot
from jobs.quality_curve.points import Data, Measured, Point
from tests.jobs.conftest import first_right

ROOT = Path(__file__).parents[2]
DATA = Data(LLAVA_NEXT, Split.VALIDATION, 70)
SMOLVLM_DATA = replace(DATA, model=SMOLVLM)
PAPERS = dict.fromkeys(LLAVA_NEXT.scores, 10.0)


def measured() -> dict[str, dict[str, Any]]:
    """The documents of the models that were measured."""
    documents: dict[str, dict[str, Any]] = json.loads((ROOT / "docs/quality.json").read_text())
    return documents


def image(seed: int) -> Views:
    draw = torch.Generator().manual_seed(seed)
    geometry = canvas_geometry(Canvas.from_image_size((60, 120), (1, 2), (8, 8)))
    scores = torch.randn(3 * 64, generator=draw)
    return Views(torch.randn(3 * 64, 4, generator=draw), scores, geometry, (60, 120))


def test_the_blind_method_keeps_no_tokens() -> None:
    assert [len(chosen.entries) for chosen in Blind().many([image(0), image(1)])] == [0, 0]


def test_foreign_scores_are_those_of_the_image_before() -> None:
    first, second = image(0), image(1)
    compressor = ForeignScores(0.25)
    _, chosen = compressor.many([first, second])
    swapped = GlobalCom2(0.25)(replace(second, scores=first.scores))
    assert chosen.entries.tolist() == swapped.entries.tolist()
    assert chosen.entries.tolist() != GlobalCom2(0.25)(second).entries.tolist()
    (third,) = compressor.many([first])
    swapped = GlobalCom2(0.25)(replace(first, scores=second.scores))
    assert third.entries.tolist() == swapped.entries.tolist(), "across batches too"


@pytest.mark.parametrize(
    ("right_rows", "chosen"),
    [
        ({10.0: 40, 1.0: 60, 3.0: 65, 30.0: 20, 100.0: 40}, 3.0),  # the best of those beyond doubt
        ({10.0: 40, 1.0: 41, 3.0: 41, 30.0: 39, 100.0: 40}, 10.0),  # better, not beyond doubt
        ({10.0: 40, 1.0: 0, 3.0: 0, 30.0: 0, 100.0: 0}, 10.0),
    ],
)
def test_the_temperature_stays_unless_another_is_significantly_better(
    right_rows: dict[float, int], chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
        rows = quality._rows(data)
        for point in points:
            right = right_rows[point.temperature]
            yield Measured(point, first_right(rows, point, right), 30.0)

    monkeypatch.setattr(quality, "measure_all", answered)
    found = quality.choose_temperatures(DATA, 1)
    assert {name: of.temperature for name, of in found.items()} == dict.fromkeys(
        LLAVA_NEXT.scores, chosen
    )
    assert all(len(of.tried) == 4 for of in found.values())


def test_each_score_has_its_own_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
        rows = quality._rows(data)
        best = {None: 3.0, "distinct": 100.0}
        for point in points:
            right = 60 if best.get(point.score, 10.0) == point.temperature else 40
            yield Measured(point, first_right(rows, point, right), 30.0)

    monkeypatch.setattr(quality, "measure_all", answered)
    found = quality.choose_temperatures(SMOLVLM_DATA, 1)
    assert {name: of.temperature for name, of in found.items()} == {
        "mean_distance": 10.0,
        "mean_query": 10.0,
        "received": 3.0,
        "distinct": 100.0,
    }


def fake_measure(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Measuring in no time; the more is other than the paper's way, the fewer rows are right."""
    asked: list[Point] = []

    def answered(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
        asked.extend(points)
        rows = quality._rows(data)
        for point in points:
            right = 60 - 5 * (point.newlines == "none") - 10 * (point.positions == "original")
            right -= 20 * (point.retention < 0.1)
            answers = first_right(rows, point, right)
            yield Measured(point, answers, 30.0 - (point.newlines == "none"))

    monkeypatch.setattr(quality, "measure_all", answered)
    monkeypatch.setattr(quality, "load", lambda model, score: None)
    monkeypatch.setattr(quality, "shares_far_from_uniform", lambda *given: {10.0: 0.5})
    return asked


def test_packings_are_compared_with_the_papers_at_their_retention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = fake_measure(monkeypatch)
    document = quality.measure(DATA, {**PAPERS, "class_token": 3.0}, 1)
    assert len(set(asked)) == len(asked), "measured twice"
    lines = {(p["retention"], p["positions"], p["newlines"]): p for p in document["packings"]}
    packings = [(p, n) for p in ("compact", "original") for n in ("kept_rows", "none")]
    assert list(lines) == [(r, *packing) for r in (0.25, 0.1, 0.05) for packing in packings]
    for (retention, positions, newlines), line in lines.items():
        assert Point("globalcom2", retention, 3.0, positions, newlines) in asked
        lost = 5 * (newlines == "none") + 10 * (positions == "original")
        base = 60 if retention >= 0.1 else 40
        assert line["mean"] == pytest.approx((base - lost) / 70)
        assert line["tokens"] == 30.0 - (newlines == "none")
        if lost:
            assert line["difference"]["mean"] == pytest.approx(-lost / 70)
        else:
            assert "difference" not in line
            assert "where_difference" not in line
    topics = [row.question.topic for row in quality._rows(DATA)]
    places = [i for i, topic in enumerate(topics) if topic == "where"]
    line = lines[0.25, "original", "none"]
    assert line["where"] == pytest.approx(sum(i < 45 for i in places) / len(places))
    lost = sum(45 <= i < 60 for i in places)
    assert lost, "nothing to see"
    assert line["where_difference"]["mean"] == pytest.approx(-lost / len(places))


def test_packings_alone_are_printed_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = fake_measure(monkeypatch)
    asked_for = ["--packings", "--model", "llava_next", "--rows", "70", "--into", str(tmp_path)]
    assert quality.main(asked_for) == 0
    assert {point.method for point in asked} == {"globalcom2"}
    assert len(asked) == len(set(asked)) == 12
    printed = capsys.readouterr().out
    assert "| at 0.1 | original | none | 0.643" in printed
    assert list(tmp_path.iterdir()) == []


def test_packings_stay_out_of_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measure(monkeypatch)
    curve = quality.measure(DATA, PAPERS, 1)["points"]
    keys = [(point["method"], point["retention"]) for point in curve]
    assert len(set(keys)) == len(keys)
    (at,) = (p for p in curve if (p["method"], p["retention"]) == ("globalcom2", 0.25))
    assert at["mean"] == pytest.approx(60 / 70)


def test_a_point_is_answered_with_its_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Recipe] = []

    def engine(loaded: object, recipe: Recipe, *rest: object) -> None:
        recipes.append(recipe)

    monkeypatch.setattr(points, "Engine", engine)
    monkeypatch.setattr(points, "answers_in_order", lambda *given: [])
    for point in (Point("globalcom2"), Point("globalcom2", 0.1, 10.0, "original", "none")):
        points.answer(SimpleNamespace(), "model", [], point)
    assert [CompressionPolicy.from_config(recipe.compression).packing for recipe in recipes] == [
        Packing(), Packing("original", "none")
    ]  # fmt: skip


def test_the_table_of_packings_is_there_once_it_was_measured() -> None:
    document = measured()["llava_next"]
    documents = {"llava_next": document}
    document.pop("packings", None)
    without = page.render(documents)
    assert "| positions |" not in without
    mean = {"mean": 0.8, "low": 0.75, "high": 0.85}
    papers = {"positions": "compact", "newlines": "kept_rows", "retention": 0.1, "tokens": 26.6}
    other = {**papers, **mean, "positions": "original", "where": 0.7}
    other["difference"] = {"mean": -0.1, "low": -0.2, "high": -0.05}
    other["where_difference"] = {"mean": 0.01, "low": -0.2, "high": 0.22}
    document["packings"] = [{**papers, **mean, "where": 0.75}, other]
    lines = page.render(documents).splitlines()
    assert [line for line in lines if line not in without.splitlines()] == [
        "| `globalcom2` | positions | newlines | exact match | tokens | difference | `where` "
        "| difference |",
        "|---|---|---|---|---|---|---|---|",
        "| at 0.1 | compact | kept_rows | 0.800 [0.750, 0.850] | 27 |  | 0.750 |  |",
        "| at 0.1 | original | kept_rows | 0.800 [0.750, 0.850] | 27 "
        "| **-10.0 [-20.0, -5.0]** | 0.700 | +1.0 [-20.0, +22.0] |",
    ]


def test_the_page_matches_the_measurements() -> None:
    documents = measured()
    text = (ROOT / "docs" / "quality.md").read_text()
    assert page.inserted(text, documents) == text, "run `make quality`"
    for name in documents:
        assert (ROOT / "docs" / MODELS[name].plot).exists()


def test_a_significant_difference_is_bold() -> None:
    in_points = verdicts.in_points
    assert in_points({"mean": 0.1, "low": 0.05, "high": 0.2}) == "**+10.0 [+5.0, +20.0]**"
    assert in_points({"mean": 0.1, "low": -0.05, "high": 0.2}) == "+10.0 [-5.0, +20.0]"


def test_a_page_without_marks_is_left_alone() -> None:
    with pytest.raises(ValueError, match="lacks the lines"):
        page.inserted("# nothing here\n", measured())


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    curve = measured()["llava_next"]["points"]
    for name in ("a.svg", "b.svg"):
        plot(curve, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    drawn = {point["method"] for point in curve} & set(COLOURS)
    assert len(drawn) >= 7
    for method in drawn:
        assert f"<!-- {method} -->" in (tmp_path / "a.svg").read_text()

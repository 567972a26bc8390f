"""`make quality`: the rule for the temperature, the controls, and what the README is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gc2ray.canvas import Canvas
from gc2ray.compression.globalcom2 import GlobalCom2
from gc2ray.pocket.rows import Split
from gc2ray.views import Views
from jobs import quality
from jobs.curves import page
from jobs.curves.controls import Blind, ForeignScores
from jobs.curves.points import Data, Measured, Point

ROOT = Path(__file__).parents[1]
DATA = Data("model", Split.VALIDATION, 70)


def image(seed: int) -> Views:
    draw = torch.Generator().manual_seed(seed)
    canvas = Canvas.of((60, 120), (1, 2), (8, 8))
    scores = torch.randn(3, 64, generator=draw)
    return Views(torch.randn(3, 64, 4, generator=draw), scores, canvas, (60, 120))


def test_the_blind_see_nothing() -> None:
    assert [len(chosen.source) for chosen in Blind().many([image(0), image(1)])] == [0, 0]


def test_foreign_scores_are_those_of_the_image_before() -> None:
    from dataclasses import replace

    first, second = image(0), image(1)
    compressor = ForeignScores(0.25)
    _, chosen = compressor.many([first, second])
    swapped = GlobalCom2(0.25)(replace(second, scores=first.scores))
    assert chosen.source.tolist() == swapped.source.tolist()
    assert chosen.source.tolist() != GlobalCom2(0.25)(second).source.tolist()
    (third,) = compressor.many([first])
    swapped = GlobalCom2(0.25)(replace(first, scores=second.scores))
    assert third.source.tolist() == swapped.source.tolist(), "across batches too"


@pytest.mark.parametrize(
    ("right_rows", "chosen"),
    [
        ({10.0: 40, 1.0: 60, 3.0: 65, 30.0: 20, 100.0: 40}, 3.0),  # the best of those beyond doubt
        ({10.0: 40, 1.0: 41, 3.0: 41, 30.0: 39, 100.0: 40}, 10.0),  # better, not beyond doubt
        ({10.0: 40, 1.0: 0, 3.0: 0, 30.0: 0, 100.0: 0}, 10.0),
    ],
)
def test_the_temperature_stays_unless_another_is_better_beyond_doubt(
    right_rows: dict[float, int], chosen: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(data: Data, points: Sequence[Point], processes: int) -> Iterator[Measured]:
        rows = quality._rows(data)
        for point in points:
            right = right_rows[point.temperature]
            answers = [row.question.answer if i < right else "x" for i, row in enumerate(rows)]
            yield Measured(point, tuple(answers), 30.0)

    monkeypatch.setattr(quality, "measure_all", measured)
    temperature, tried = quality.choose_temperature(DATA, 1)
    assert temperature == chosen
    assert len(tried) == 4


def test_the_readme_says_what_was_measured() -> None:
    document = json.loads((ROOT / "docs" / "quality.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert page.inserted(readme, document) == readme, "run `make quality`"
    assert (ROOT / "docs" / "quality.svg").exists()


def test_a_difference_beyond_doubt_is_bold() -> None:
    assert page._points({"mean": 0.1, "low": 0.05, "high": 0.2}) == "**+10.0 [+5.0, +20.0]**"
    assert page._points({"mean": 0.1, "low": -0.05, "high": 0.2}) == "+10.0 [-5.0, +20.0]"


def test_a_readme_without_marks_is_left_alone() -> None:
    document = json.loads((ROOT / "docs" / "quality.json").read_text())
    with pytest.raises(ValueError, match="lacks the lines"):
        page.inserted("# nothing here\n", document)


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    document = json.loads((ROOT / "docs" / "quality.json").read_text())
    for name in ("a.svg", "b.svg"):
        page.plot(document, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    for method in page.COLOURS:
        assert f"<!-- {method} -->" in (tmp_path / "a.svg").read_text()

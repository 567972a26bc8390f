"""`make quality` on both models: smaller images, scores, markers, and what the page concludes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gc2ray.compression.base import Compressor
from gc2ray.compression.packing import Packing
from gc2ray.compression.registry import COMPRESSORS
from gc2ray.compression.views import Views
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.questions import TOPICS as TOPICS_OF_SCENES
from gc2ray.demo.rows import DemoRow, Split, demo_rows
from gc2ray.demo.spec import smolvlm_spec
from gc2ray.models import loading
from gc2ray.models.base import Family
from gc2ray.models.families.tiny_smolvlm import untrained_smolvlm
from jobs import quality
from jobs.quality_curve import page, verdicts
from jobs.quality_curve.downsample import smaller
from jobs.quality_curve.models import LLAVA_NEXT, SMOLVLM, DemoModel
from jobs.quality_curve.plan import Plan
from jobs.quality_curve.points import Data, Measured, Point, _Workplace, answer, load
from jobs.quality_curve.several import rows_with_images
from tests.jobs.conftest import first_right

ROWS = 70


@cache
def rows(count: int = ROWS) -> tuple[DemoRow, ...]:
    return tuple(demo_rows(Split.VALIDATION, count, opened_photos()))


def export(folder: Path, **changes: Any) -> Path:
    model, files = untrained_smolvlm(replace(smolvlm_spec(), **changes))
    model.save_pretrained(folder)
    files.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second model before its training."""
    return export(tmp_path_factory.mktemp("smolvlm"))


def family(directory: Path) -> Family:
    return loading.load_metadata(str(directory), dtype="float32").family


def test_a_smaller_image_is_the_largest_that_fits() -> None:
    """On LLaVA-NeXT: of all sizes with its proportions, down to a view."""
    model = family(LLAVA_NEXT.directory)
    fitted = 0
    for row in rows(35):
        (height, width), longest = row.scene.size, max(row.scene.size)
        full = model.geometry((height, width)).visual_tokens
        assert smaller(model, (height, width), 1.0).size == (height, width)
        sizes = [
            (round(height * side / longest), round(width * side / longest))
            for side in range(longest, 55, -1)
        ]
        tokens = {size: model.geometry(size).visual_tokens for size in sizes}
        for retention in (0.75, 0.5, 0.1):
            found = smaller(model, (height, width), retention)
            assert found.tokens == tokens[found.size]
            if min(tokens.values()) > retention * full:
                assert found.tokens == min(tokens.values()), "nothing fits: the fewest"
            else:
                fitted += 1
                assert found.tokens <= retention * full
            larger = sizes[: sizes.index(found.size)]
            assert all(tokens[size] > found.tokens for size in larger)
            assert all(tokens[size] > retention * full for size in larger)
    assert fitted > 20


def test_smolvlm_lowers_its_longer_side_instead(smolvlm: Path) -> None:
    """Whatever an image's size, it is scaled to that side: smaller images save nothing."""
    model = family(smolvlm)
    for size, full in (((160, 320), 108), ((160, 300), 180), ((40, 75), 180)):
        assert smaller(model, size, 0.7) == replace(
            smaller(model, size, 1.0), longest=84, tokens=36
        )
        assert smaller(model, size, 1.0).tokens == full
        assert smaller(model, size, 0.05).size == size


def test_a_lowered_side_is_the_processors_own_setting(smolvlm: Path, tmp_path: Path) -> None:
    """As if the checkpoint had come with it, token by token; and nothing of it stays."""
    lower = export(tmp_path / "lower", longest=84)
    some, loaded = rows(35)[::7], load(str(smolvlm))
    small = answer(loaded, str(smolvlm), some, Point("downsample", 0.25))
    expected = answer(load(str(lower)), str(lower), some, Point("none"))
    assert [a.token_ids for a in small] == [a.token_ids for a in expected]
    assert [a.visual_tokens_kept for a in small] == [36] * len(some)
    whole = answer(loaded, str(smolvlm), some, Point("none"))
    assert {a.visual_tokens_kept for a in whole} <= {108, 180}
    unchanged = answer(loaded, str(smolvlm), some, Point("downsample", 1.0))
    assert [a.token_ids for a in unchanged] == [a.token_ids for a in whole]
    assert [a.token_ids for a in small] != [a.token_ids for a in whole]


def test_rows_of_several_settings_are_answered_in_order(tmp_path: Path) -> None:
    """With more views there is more than one side to choose from."""
    directory = str(export(tmp_path / "more", longest=336))
    some, loaded = rows(35)[::5], load(directory)
    answers = answer(loaded, directory, some, Point("downsample", 0.6))
    promised = [smaller(loaded.adapter.family, row.scene.size, 0.6) for row in some]
    assert [a.visual_tokens_kept for a in answers] == [found.tokens for found in promised]
    settings = [found.longest or 0 for found in promised]
    assert len(set(settings)) > 1
    assert settings != sorted(settings)
    assert settings != sorted(settings, reverse=True)


def test_smaller_images_are_answered_in_order_with_the_tokens_promised() -> None:
    some, directory = rows(35)[::5], str(LLAVA_NEXT.directory)
    loaded = load(directory)
    answers = answer(loaded, directory, some, Point("downsample", 0.5))
    assert [a.visual_tokens_kept for a in answers] == [
        smaller(loaded.adapter.family, row.scene.size, 0.5).tokens for row in some
    ]
    assert len({a.visual_tokens_kept for a in answers}) > 1


def test_a_process_measures_one_score_after_the_other(smolvlm: Path) -> None:
    """What it remembers of an image has the score that is asked for, and smaller images none."""
    data = Data(replace(SMOLVLM, directory=smolvlm), Split.VALIDATION, 5)
    workplace, some = _Workplace(data), rows(5)
    points = [Point("local", 0.25, score=score) for score in (None, "received", "distinct", None)]
    found = {}
    for point in points:
        found[point] = workplace.measure(point)
        fresh = answer(load(str(smolvlm), point.score), str(smolvlm), some, point)
        assert found[point].answers == tuple(a.answer for a in fresh)
        assert found[point].tokens == sum(a.visual_tokens_kept or 0 for a in fresh) / 5
        assert found[point].prompt_tokens == sum(a.prompt_tokens or 0 for a in fresh) / 5
        assert found[point].fitting == 1
    assert len({measured.answers for measured in found.values()}) > 1, "scores change nothing"
    small = workplace.measure(Point("downsample", 0.25))
    assert small.tokens == 36
    assert small.fitting < 1


def test_the_second_image_does_not_change_the_answer() -> None:
    found = rows_with_images(rows(), 2)
    assert len(found) == 40, "four of seven topics"
    assert [each.images.index(each.row) for each in found] == [0, 1] * 20
    for each in found:
        (other,) = (shown for shown in each.images if shown is not each.row)
        for question in TOPICS_OF_SCENES[each.row.question.topic](other.scene):
            assert question.text != each.row.question.text


def test_rows_of_two_images_are_measured_by_their_budget(smolvlm: Path) -> None:
    data = Data(replace(SMOLVLM, directory=smolvlm), Split.VALIDATION, 12)
    workplace, count = _Workplace(data), len(rows_with_images(rows(12), 2))
    found = []
    for budget in ("image", "row"):
        point = Point("globalcom2", 0.25, images=2, budget=budget)  # type: ignore[arg-type]
        found.append(workplace.measure(point))
        fresh = answer(load(str(smolvlm)), str(smolvlm), rows(12), point)
        assert found[-1].answers == tuple(a.answer for a in fresh)
        assert [len(a.kept_per_view or ()) for a in fresh] == [2] * count
    assert found[0].tokens == pytest.approx(found[1].tokens, rel=0.1)
    assert found[0].answers != found[1].answers
    whole = workplace.measure(Point("none", images=2))
    assert len(whole.answers) == count


def uncompressed(model: Family, size: tuple[int, int]) -> Views:
    geometry = model.geometry(size)
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(geometry.tokens, 4, generator=draw)
    return Views(features, torch.randn(geometry.tokens, generator=draw), geometry, size)


def test_only_the_thumbnail_alone_leaves_views_without_a_token(smolvlm: Path) -> None:
    """Which the page says of markers."""
    model = family(smolvlm)
    for size in ((100, 100), (160, 320), (320, 160)):
        image = uncompressed(model, size)
        for method in SMOLVLM.methods:
            kind: Any = COMPRESSORS[method]
            compressor: Compressor = kind(retention=0.01)
            chosen = [compressor(image)]
            (packed,) = Packing(markers="kept_views").apply([image], chosen)
            assert packed.entries.tolist() == chosen[0].entries.tolist(), method
        chosen = [COMPRESSORS["thumbnail"]()(image)]
        (packed,) = Packing(markers="kept_views").apply([image], chosen)
        assert len(packed.entries) < len(chosen[0].entries)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """Measuring in no time; `distinct` answers more rows than other scores do, `local` fewer."""
    wanted_points: list[Point] = []

    def measured(data: Data, wanted: Sequence[Point], processes: int) -> Iterator[Measured]:
        wanted_points.extend(wanted)
        for point in wanted:
            right = 50 + 15 * (point.score == "distinct") - 15 * (point.method == "local")
            right -= 20 * (point.method == "downsample")
            right -= 30 * (point.images > 1) - 10 * (point.budget == "row")
            answers = first_right(rows(), point, right)
            tokens = 36.0 if point.method == "downsample" else 100 * point.retention
            yield Measured(point, answers, tokens, tokens + 20, 0.5)

    monkeypatch.setattr(quality, "measure_all", measured)
    monkeypatch.setattr(quality, "load", lambda model, score: None)
    monkeypatch.setattr(
        quality, "shares_far_from_uniform", lambda *given: dict.fromkeys(given[-1], 0.5)
    )
    return wanted_points


def measured_on(model: DemoModel) -> dict[str, Any]:
    data = Data(model, Split.VALIDATION, ROWS)
    return quality.document(data, data, 1)


@pytest.mark.parametrize("model", [LLAVA_NEXT, SMOLVLM], ids=lambda model: model.name)
def test_everything_is_measured_once_and_shown(model: DemoModel, asked: list[Point]) -> None:
    document = measured_on(model)
    planned = Plan(model, dict.fromkeys(model.scores, 10.0)).points()
    assert sorted(map(repr, asked[-len(planned) :])) == sorted(map(repr, planned))
    assert len(set(planned)) == len(planned)
    # Points of one score follow each other, as images are encoded again for each.
    order = [point.score for point in planned]
    assert order == sorted(order, key=order.index)
    text = page.render({model.name: document})
    for score in model.scores:
        assert f"| `{score}` | {model.low[0]:g} |" in text
    assert ("`thumbnail`, markers" in text) == (model is SMOLVLM)
    assert "`globalcom2` - `downsample` | **+28.6" in text
    assert "| at 0.75 | 50% | 0.429" in text
    # 56 tokens of a prompt are those of `globalcom2` at 0.25, not at 0.5.
    assert {line["globalcom2"]["retention"] for line in document["downsampled"]} == {0.25}
    assert "**One budget for two images pays.** 40 of the rows" in text
    assert "| `globalcom2` at 0.25 | row | 0.750" in text
    assert "Not measured yet" in text, "the other model"
    assert json.loads(json.dumps(document)) == document


def test_verdicts_follow_the_figures(asked: list[Point]) -> None:
    text = page.render({"smolvlm": measured_on(SMOLVLM)})
    assert "**On this model the thumbnail's guidance pays.**" in text
    assert "without a class token" in text
    assert "**`distinct` is, and should be the default.**" in text


def difference(low: float, high: float, retention: float = 0.1) -> dict[str, Any]:
    name = "`globalcom2` - `local`"
    return {
        "name": name,
        "retention": retention,
        "mean": (low + high) / 2,
        "low": low,
        "high": high,
    }


@pytest.mark.parametrize(
    ("at_first", "at_second", "verdict"),
    [
        ((0.01, 0.03), (0.01, 0.02), "pays.**"),
        ((0.01, 0.03), (-0.01, 0.02), "pays at one retention of two.**"),
        ((-0.01, 0.03), (-0.01, 0.02), "does not pay: no gain was found.**"),
        ((-0.03, -0.01), (-0.01, 0.02), "does not pay: it costs accuracy.**"),
        ((0.01, 0.03), (-0.02, -0.01), "helps at one retention and costs accuracy at another.**"),
    ],
)
def test_guidance_is_judged_by_its_intervals(
    at_first: tuple[float, float], at_second: tuple[float, float], verdict: str
) -> None:
    points = [
        {"method": method, "retention": r, "tokens": 100 * r}
        for method in ("globalcom2", "local")
        for r in (0.25, 0.1)
    ]
    found = [difference(*at_first, 0.25), difference(*at_second, 0.1)]
    other = {**difference(-0.9, -0.8), "name": "`globalcom2` - `local`, 2x2 grids"}
    text = verdicts.guidance([*found, other], points)
    assert f"thumbnail's guidance {verdict}" in text
    assert "at 0.25 (25 and 25 tokens)" in text


@pytest.mark.parametrize(
    ("received", "verdict"),
    [
        (((0.01, 0.03), (0.01, 0.02)), "**`received` is, and is the default.**"),
        (
            ((0.01, 0.03), (-0.01, 0.02)),
            "should be the default.** Better at one of them only: `rec",
        ),
        (((-0.01, 0.03), (-0.01, 0.02)), "**None is: `mean_distance` should be the default.**"),
        (((-0.03, -0.01), (-0.01, 0.02)), "should be the default.** Worse: `received`."),
    ],
)
def test_the_papers_score_is_the_default_unless_another_is_better_at_every_retention(
    received: tuple[tuple[float, float], ...], verdict: str
) -> None:
    lines: list[dict[str, Any]] = []
    for retention, interval in zip((0.25, 0.1), received, strict=True):
        for score in SMOLVLM.scores:
            for method in ("globalcom2", "local"):
                line = {"score": score, "method": method, "retention": retention}
                of = interval if score == "received" else (-0.01, 0.01)
                of = of if method == "globalcom2" else (-0.9, -0.8)
                lines.append(
                    line | ({"difference": difference(*of)} if score != "mean_distance" else {})
                )
    text = verdicts.default_score(SMOLVLM, lines)
    assert verdict in text
    assert "at 0.25 and 0.1" in text


def test_the_class_token_stays_the_default_whatever_is_better() -> None:
    lines: list[dict[str, Any]] = []
    for score in LLAVA_NEXT.scores:
        line = {"score": score, "method": "globalcom2", "retention": 0.1}
        better = difference(0.01, 0.03) if score == "distinct" else difference(-0.01, 0.02)
        lines.append(line | ({"difference": better} if score != "class_token" else {}))
    text = verdicts.default_score(LLAVA_NEXT, lines)
    assert "With a class token its score is the default" in text
    assert text.endswith("at 0.1. **Better beyond doubt**: `distinct`.")


def test_a_model_is_measured_beside_what_is_known_of_the_other(
    asked: list[Point], smolvlm: Path, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "quality.md").write_text(f"Above\n{page.BEGIN}\nold\n{page.END}\nbelow")
    known = {"llava_next": measured_on(LLAVA_NEXT)}
    (tmp_path / "docs" / "quality.json").write_text(json.dumps(known))
    sizes = ["--rows", str(ROWS), "--validation-rows", str(ROWS), "--into", str(tmp_path)]
    chosen = ["--model", "smolvlm", "--weights", str(smolvlm)]
    assert quality.main([*chosen, *sizes]) == 0
    documents = json.loads((tmp_path / "docs" / "quality.json").read_text())
    assert list(documents) == ["llava_next", "smolvlm"]
    assert documents["llava_next"] == known["llava_next"]
    text = (tmp_path / "docs" / "quality.md").read_text()
    assert text == f"Above\n{page.render(documents)}\nbelow"
    assert "Not measured yet" not in text
    assert "quality-smolvlm.svg" in text
    assert (tmp_path / "docs" / "quality-smolvlm.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smolvlm", "--weights", "nowhere"], "--model smolvlm: no model in nowhere"),
        (["--weights", "nowhere"], "--weights are those of one model: name it by --model"),
        (["--model", "llava_next", "--into", "nowhere"], "no docs/quality.md to write into"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err

"""Scenes, questions about them, and the rows made of both."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gc2ray.core.config.input import ImageLimits
from gc2ray.core.records import ImageRef
from gc2ray.demo import questions
from gc2ray.demo.drawing import draw
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import Split, demo_rows, write_rows
from gc2ray.demo.scenes import (
    COLOURS,
    KINDS,
    MIDDLE,
    Scene,
    Sign,
    Style,
    Thing,
    sample_scene,
)
from gc2ray.demo.spec import GRIDS, demo_anyres
from gc2ray.engine.prompt_builder import load_tiles

SCENE = Scene(
    size=(200, 100),
    grid=(2, 1),
    things=(Thing("star", "blue", (60, 20, 80, 40)), Thing("7", "red", (10, 150, 20, 170))),
    sign=Sign("42", (10, 20, 40, 40)),
    seed=5,
)


def scenes(count: int, style: Style | None = None) -> list[Scene]:
    return [
        sample_scene(
            np.random.default_rng([9, seed]), demo_anyres(), GRIDS[seed % 5], style or Style()
        )
        for seed in range(count)
    ]


def test_a_scene_is_cut_into_its_grid() -> None:
    for scene in scenes(100):
        assert demo_anyres().grid(scene.size) == scene.grid


def test_no_object_overlaps_another_or_crosses_a_cut() -> None:
    anyres = demo_anyres()
    for scene in scenes(200):
        boxes = [thing.box for thing in scene.things]
        if scene.sign is not None:
            boxes.append(scene.sign.box)
        for place, box in enumerate(boxes):
            assert 0 <= box[0] < box[2] <= scene.size[1]
            assert 0 <= box[1] < box[3] <= scene.size[0]
            for other in boxes[:place]:
                apart = (
                    box[2] <= other[0] or other[2] <= box[0]
                    or box[3] <= other[1] or other[3] <= box[1]
                )  # fmt: skip
                assert apart
            assert abs((box[0] + box[2]) / 2 / scene.size[1] - 0.5) >= MIDDLE
            assert abs((box[1] + box[3]) / 2 / scene.size[0] - 0.5) >= MIDDLE
        # The same picture with only the things white: every crop shows each whole or not at all.
        for box in boxes:
            mask = Image.new("RGB", (scene.size[1], scene.size[0]))
            mask.paste((255, 255, 255), tuple(round(edge) for edge in box))
            buffer = io.BytesIO()
            mask.save(buffer, "PNG")
            tiles = load_tiles(ImageRef(buffer.getvalue()), anyres, ImageLimits())
            light = (tiles.pixels[1:] > 127).any(axis=-1).sum(axis=(1, 2))
            assert np.sort(light)[::-1][1:].sum() <= 0.1 * light.sum()


def test_kinds_and_colours_are_distinct_where_the_style_says_so() -> None:
    for scene in scenes(100):
        assert len({thing.kind for thing in scene.things}) == len(scene.things)
        assert len({thing.colour for thing in scene.things}) == len(scene.things)
    crowded = Style(things=(0, 0, 0, 0, 0, 0, 0, 0, 1.0), rich=0, distinct=False)
    assert any(len({t.colour for t in s.things}) < len(s.things) for s in scenes(20, crowded))


def test_every_kind_colour_and_count_occurs() -> None:
    found = scenes(600)
    assert {thing.kind for scene in found for thing in scene.things} == set(KINDS)
    assert {thing.colour for scene in found for thing in scene.things} == set(COLOURS)
    assert {len(scene.things) for scene in found} == {1, 2, 3, 4}
    rich = [scene for scene in found if _crops_with_something(scene) == 1 < len(scene.things)]
    assert len(rich) / len(found) > 0.2, "crops of unequal richness"


def _crops_with_something(scene: Scene) -> int:
    rows, columns = scene.grid
    return len(
        {
            (int(y / scene.size[0] * rows), int(x / scene.size[1] * columns))
            for x, y in (thing.centre for thing in scene.things)
        }
    )


def test_drawing_shows_the_things_in_their_colours() -> None:
    image = draw(SCENE, [])
    blue = np.asarray(image)[30, 70].astype(int)
    assert blue[2] > blue[0] + 80
    assert blue[2] > blue[1] + 80
    assert np.asarray(image)[25, 12].min() > 200, "the sign's plate"
    assert np.asarray(draw(SCENE, opened_photos())).shape == (200, 100, 3)


def test_answers_are_right() -> None:
    asked = {name: ask(SCENE) for name, ask in questions.TOPICS.items()}
    assert [(q.text, q.answer) for q in asked["which"]] == [
        ("Which shape is blue?", "star"),
        ("Which digit is red?", "7"),
    ]
    assert [(q.text, q.answer) for q in asked["colour"]] == [
        ("What colour is the star?", "blue"),
        ("What colour is the 7?", "red"),
    ]
    assert [(q.text, q.answer) for q in asked["where"]] == [
        ("Where is the blue star?", "top right"),
        ("Where is the red 7?", "bottom left"),
    ]
    assert asked["count"][0].answer == "2"
    assert asked["sign"][0].answer == "42"
    assert asked["caption"][0].answer == "a red 7, a blue star and a sign with 42"
    assert all(q.topic == name for name, found in asked.items() for q in found)


def test_yes_and_no_answers_are_right() -> None:
    answers = set()
    for scene in scenes(100):
        present = {f"Is there a {thing.colour} {thing.kind}?" for thing in scene.things}
        for question in questions.yesno(scene):
            assert (question.text in present) == (question.answer == "yes")
            answers.add(question.answer)
    assert answers == {"yes", "no"}


def test_rows_are_reproducible_and_splits_share_none() -> None:
    photographs = opened_photos()
    first = list(demo_rows(Split.TEST, 14, photographs))
    again = list(demo_rows(Split.TEST, 4, photographs, first=10))
    assert first[10:] == again
    assert {row.question.topic for row in first} == set(questions.TOPICS)
    seeds = {
        split: {row.scene.seed for row in demo_rows(split, 70, photographs)} for split in Split
    }
    assert all(len(found) == 70 for found in seeds.values())
    assert not seeds[Split.TEST] & seeds[Split.VALIDATION]
    assert not seeds[Split.TEST] & seeds[Split.TRAIN]
    assert not seeds[Split.TRAIN] & seeds[Split.VALIDATION]
    grids = {row.scene.grid for row in demo_rows(Split.TEST, 35, photographs)}
    assert grids == set(GRIDS)


def test_rows_are_written_as_users_have_theirs(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.parquet"
    assert write_rows(path, demo_rows(Split.TEST, 7, [])) == 7
    table = pq.read_table(path)
    assert table.column_names == ["id", "image", "question", "reference", "topic"]
    row = table.to_pylist()[4]
    assert row["topic"] == "sign"
    assert row["reference"].isdigit()
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert image.format == "JPEG"


def test_a_grid_that_no_size_is_cut_into_is_an_error() -> None:
    with pytest.raises(ValueError, match="is cut into"):
        sample_scene(np.random.default_rng(0), demo_anyres(), (5, 5), Style())

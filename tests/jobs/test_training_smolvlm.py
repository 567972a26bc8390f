"""Training of the second demo model: what it trains is what stock transformers runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import Split, demo_rows, picture
from gc2ray.demo.scenes import KINDS, Scene, Sign, Style, Thing, sample_scene
from gc2ray.demo.spec import GRIDS, demo_anyres, smolvlm_cropping, smolvlm_spec
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.processor import Processor
from jobs.train_demo import main
from jobs.training.dialogues import VISUAL
from jobs.training.labels import PATCH_COLOURS, kind_shares, view_labels
from jobs.training.language import LanguageLearner
from jobs.training.lessons import ASKED, Lessons
from jobs.training.smolvlm import SmolVlmCutter, SmolVlmPocket, merged_shares
from jobs.training.tower import TowerLearner

SIDE = 12
"""Patches in a row of a view."""


@pytest.fixture(scope="module")
def untrained() -> tuple[Any, Any]:
    model, files = SmolVlmPocket().untrained(seed=0)
    return model.eval(), Processor.from_transformers(files)


def learner(untrained: tuple[Any, Any], *, reads: bool = False) -> LanguageLearner:
    tower = TowerLearner(untrained[0], SmolVlmPocket())
    return LanguageLearner(*untrained, tower, tower_share=0.0, reads=reads)


def lesson_scenes(split: Split, stage: int, batch: int, scenes: int) -> Iterator[Scene]:
    """The scenes of a lesson that asks questions."""
    for place in range(scenes):
        rng = np.random.default_rng([split.value, stage, batch, place])
        yield sample_scene(rng, demo_anyres(), GRIDS[batch % len(GRIDS)], ASKED)


def stock_inputs(processor: Any, image: Image.Image, text: str) -> dict[str, torch.Tensor]:
    """Pixels of transformers' processor and ids of the whole prompt, its marker expanded."""
    cut = processor.image_processor(image, return_row_col_info=True, return_tensors="pt")
    grid = cut["rows"][0][0], cut["cols"][0][0]
    names = "<fake_token_around_image>", "<image>", "<global-img>"
    view = get_image_prompt_string(*grid, smolvlm_spec().tokens, *names)
    expanded = text.replace("<image>", view)
    ids = processor.tokenizer(expanded, add_special_tokens=False, return_tensors="pt")
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
        "pixel_values": cut["pixel_values"],
        "pixel_attention_mask": cut["pixel_attention_mask"],
    }


def test_cuts_are_those_of_transformers(untrained: tuple[Any, Any]) -> None:
    _, processor = untrained
    cutter, rng = SmolVlmCutter(), np.random.default_rng(0)
    for height, width in ((200, 100), (333, 90), (301, 299), (30, 31), (7, 200), (84, 84)):
        image = Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        cut = cutter.cut(buffer.getvalue())
        stock = processor.image_processor(image, do_rescale=False, do_normalize=False)
        views = np.stack(stock["pixel_values"][0]).transpose(0, 2, 3, 1)
        assert np.array_equal(views, cut.pixels)


def test_labels_name_what_patches_show_and_the_thumbnail_is_last() -> None:
    """A 168 x 336 image is cut into 1 x 2 crops at half size; 1 patch is 14 pixels of it."""
    scene = Scene(
        size=(168, 336),
        grid=(1, 2),
        things=(Thing("7", "red", (14, 28, 28, 56)),),
        sign=Sign("12", (252, 0, 280, 14)),
        seed=0,
    )
    labels = view_labels(scene, SmolVlmCutter())

    def named(view: int) -> dict[tuple[int, int], str]:
        grid = labels.kinds[view].reshape(SIDE, SIDE)
        return {(int(r), int(c)): KINDS[grid[r, c] - 1] for r, c in np.argwhere(grid)}

    assert named(0) == {(2, 1): "7", (3, 1): "7"}
    assert named(1) == {(0, 6): "1", (0, 7): "2"}
    assert set(named(2)) == {(2, 0), (3, 0), (0, 9)}
    assert PATCH_COLOURS[labels.colours[1].reshape(SIDE, SIDE)[0, 7] - 1] == "sign-second"
    assert labels.present[:, KINDS.index("7")].tolist() == [1, 0, 1]
    tokens = merged_shares(kind_shares(labels.kinds), scale=2).reshape(3, 6, 6, -1)
    assert tokens[0, 1, 0, KINDS.index("7")] == 1.0
    assert tokens[0].sum() == 1.0
    assert tokens[1, 0, 3, [KINDS.index("1"), KINDS.index("2")]].tolist() == [0.5, 0.5]


def test_labels_follow_the_cuts() -> None:
    """Drawn as white on black, a thing lights up exactly around the patches that carry its name."""
    cutter = SmolVlmCutter()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, demo_anyres(), GRIDS[seed % 5], Style(things=(1.0,), sign=0))
        image = Image.new("RGB", (scene.size[1], scene.size[0]))
        image.paste((255, 255, 255), tuple(round(edge) for edge in scene.things[0].box))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        light = cutter.cut(buffer.getvalue()).pixels[..., 0].astype(float) / 255
        share = light.reshape(-1, SIDE, 7, SIDE, 7).mean(axis=(2, 4)).reshape(len(light), -1)
        marked = view_labels(scene, cutter).kinds > 0
        assert share[marked].min() > 0.1
        assert share[~marked].max() < 0.6


def test_no_thing_lies_across_a_cut() -> None:
    """Why images are cut into two rows or columns at most: things keep clear of middle lines."""
    cutter = SmolVlmCutter()
    for seed in range(100):
        scene = sample_scene(np.random.default_rng(seed), demo_anyres(), GRIDS[seed % 5], Style())
        *crops, _ = cutter.boxes_in_views(scene, [thing.box for thing in scene.things])
        inside = [((crop > -0.5) & (crop < cutter.tile + 0.5)).all(axis=1) for crop in crops]
        assert np.sum(inside, axis=0).min() == 1


@torch.no_grad()
def test_dialogues_are_what_stock_transformers_reads(untrained: tuple[Any, Any]) -> None:
    """Ids, positions and logits of a question, against the whole prompt and its pixels."""
    model, processor = untrained
    teacher = learner(untrained)
    chat = ChatPrompt(processor)
    for batch in range(len(GRIDS)):
        lesson = Lessons(SmolVlmCutter(), Split.VALIDATION, 1, 1, 1)[batch]
        (scene,) = lesson_scenes(Split.VALIDATION, 1, batch, 1)
        image = Image.open(io.BytesIO(picture(scene, opened_photos()))).convert("RGB")
        question = lesson.questions[0][0]
        inputs = stock_inputs(processor, image, chat.render(question.text))
        features, _ = teacher._tower.run(lesson.pixels)
        (shown,) = teacher._packer.pack(lesson.tiles, lesson.labels, features)
        dialogue = teacher._dialogues.make(shown.marks, [question])
        ids = inputs["input_ids"][0].tolist()
        mine = [processor.image_token_id if token == VISUAL else token for token in dialogue.ids]
        assert mine[: len(ids)] == ids
        assert dialogue.positions == list(range(len(mine)))
        embeds = model.get_input_embeddings()(torch.tensor([ids]))
        embeds[0, inputs["input_ids"][0] == processor.image_token_id] = shown.embeds
        own = model(inputs_embeds=embeds).logits
        torch.testing.assert_close(own, model(**inputs).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_all_questions_at_once_cost_what_stock_transformers_says_one_by_one(
    untrained: tuple[Any, Any],
) -> None:
    model, processor = untrained
    lesson = Lessons(SmolVlmCutter(), Split.VALIDATION, 1, 2, 4)[3]
    _, figures = learner(untrained).loss(lesson)
    chat = ChatPrompt(processor)
    costs = []
    scenes = lesson_scenes(Split.VALIDATION, 1, 3, 2)
    for scene, asked in zip(scenes, lesson.questions, strict=True):
        image = Image.open(io.BytesIO(picture(scene, opened_photos()))).convert("RGB")
        for question in asked:
            answer = f" {question.answer}{processor.tokenizer.eos_token}"
            inputs = stock_inputs(processor, image, f"{chat.render(question.text)}{answer}")
            count = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
            logits = model(**inputs).logits[0, -count - 1 : -1]
            cost = F.cross_entropy(logits, inputs["input_ids"][0, -count:], reduction="sum")
            costs.append((float(cost), count))
    cost, tokens = np.sum(costs, axis=0)
    assert float(figures["answers"]) == pytest.approx(cost / tokens, rel=1e-5)


def test_only_visual_tokens_move_closer(untrained: tuple[Any, Any]) -> None:
    from jobs.training.language import _steps

    lesson = Lessons(SmolVlmCutter(), Split.TRAIN, 1, 8, 2)[2]
    marks = learner(untrained)._packer.pack(
        lesson.tiles, lesson.labels, torch.zeros(len(lesson.pixels), SIDE * SIDE, 128)
    )
    moved = 0
    for place, image in enumerate(marks):
        steps = _steps(lesson, place, image.marks)
        assert steps is not None
        visual = np.array(image.marks) == VISUAL
        assert (steps[~visual] == 1).all()
        moved += int((steps[visual] == 0).any())
    assert moved > 2


@pytest.mark.usefixtures("short_stages")
def test_the_written_model_answers_by_stock_generate(tmp_path: Path) -> None:
    main([str(tmp_path), "--family", "smolvlm"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    images = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    processor = Processor.from_transformers(SmolVlmPocket().untrained(seed=0)[1])
    assert tokenizer.chat_template == processor.chat_template
    assert images.size["longest_edge"] == smolvlm_spec().longest
    (row,) = demo_rows(Split.TEST, 1, opened_photos())
    image = Image.open(io.BytesIO(row.image)).convert("RGB")
    text = ChatPrompt(processor).render(row.question.text)
    out = model.generate(**stock_inputs(processor, image, text), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > len(tokenizer(text)["input_ids"])
    assert smolvlm_cropping().grid((image.height, image.width)) != (0, 0)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("short_stages")
def test_training_resumes_where_it_stopped(
    tmp_path: Path, train_until: Callable[[list[str], int], None]
) -> None:
    """Stopped in the third stage and started again: the weights of a run in one piece."""
    whole, stopped = (
        [str(tmp_path / name), "--family", "smolvlm"] for name in ("whole", "stopped")
    )
    main(whole)
    train_until(stopped, 10)
    main(stopped)
    ends = [
        torch.load(tmp_path / name / "together.pt", weights_only=True)["model"]
        for name in ("whole", "stopped")
    ]
    torch.testing.assert_close(*ends)

"""Training of the demo model: labels, loss, and going on after a stop."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from gc2ray.demo.photos import opened_photos
from gc2ray.demo.questions import quarter
from gc2ray.demo.rows import Split, picture
from gc2ray.demo.scenes import KINDS, Scene, Sign, Style, Thing, sample_scene
from gc2ray.demo.spec import GRIDS, demo_anyres, demo_spec
from gc2ray.engine.decoding.decoder import end_tokens
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.tiny import untrained
from gc2ray.models.hf_reference import stock_inputs
from gc2ray.models.processor import Processor
from gc2ray.models.registry import adapter_of
from jobs.train_demo import main
from jobs.training.dialogues import attention_mask
from jobs.training.labels import PATCH_COLOURS, view_labels
from jobs.training.language import LanguageLearner
from jobs.training.lessons import ASKED, Lessons, noted
from jobs.training.llava_next import LlavaNextPocket, LlavaNextTower, quarters
from jobs.training.positions import STOCK_SHARE, squeezed_steps
from jobs.training.tower import TowerLearner
from jobs.training.trainer import Averages, Stage

PATCH = 7
POCKET = LlavaNextPocket()


def named(kinds: np.ndarray, view: int) -> dict[tuple[int, int], str]:
    """Kind of each patch of a view that shows a thing, by row and column."""
    grid = kinds[view].reshape(8, 8)
    return {(int(r), int(c)): KINDS[grid[r, c] - 1] for r, c in np.argwhere(grid)}


def test_labels_name_what_patches_show() -> None:
    """A 112 x 224 image fits its canvas of two crops at half size; 1 patch is 14 pixels of it."""
    scene = Scene(
        size=(112, 224),
        grid=(1, 2),
        things=(Thing("7", "red", (14, 28, 28, 56)),),
        sign=Sign("12", (168, 0, 196, 14)),
        seed=0,
    )
    labels = view_labels(scene, POCKET.cutter)
    assert named(labels.kinds, 1) == {(2, 1): "7", (3, 1): "7"}
    assert named(labels.kinds, 2) == {(0, 4): "1", (0, 5): "2"}
    # The thumbnail is squeezed to a quarter in width: two digits share a patch, the first has it.
    assert set(named(labels.kinds, 0)) == {(2, 0), (3, 0), (0, 6)}
    colours = labels.colours[2].reshape(8, 8)
    assert PATCH_COLOURS[colours[0, 4] - 1] == "sign-first"
    assert PATCH_COLOURS[colours[0, 5] - 1] == "sign-second"
    assert labels.present[:, KINDS.index("7")].tolist() == [1, 1, 0]
    assert labels.present[:, KINDS.index("2")].tolist() == [1, 0, 1]


def test_labels_follow_padding_and_crops() -> None:
    """Drawn as white on black, a thing lights up exactly around the patches that carry its name."""
    from gc2ray.models.image_processor import tile

    anyres = demo_anyres()
    for seed in range(25):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, anyres, GRIDS[seed % 5], Style(things=(1.0,), sign=0))
        image = Image.new("RGB", (scene.size[1], scene.size[0]))
        image.paste((255, 255, 255), tuple(round(edge) for edge in scene.things[0].box))
        light = tile(image, anyres).pixels[..., 0].astype(float) / 255
        share = light.reshape(-1, 8, PATCH, 8, PATCH).mean(axis=(2, 4)).reshape(len(light), -1)
        marked = view_labels(scene, POCKET.cutter).kinds > 0
        assert share[marked].min() > 0.1
        assert share[~marked].max() < 0.6


def test_a_mask_shows_each_question_the_image_and_itself() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 1, 1, 2, -2]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def untrained_demo() -> tuple[Any, Processor]:
    model, processor = untrained(demo_spec())
    return model, Processor.from_transformers(processor)


def stock_cost(loaded: LoadedModel, answer: str, inputs: Any) -> tuple[float, int]:
    """Cross entropy of an answer that ends the inputs, by stock transformers; and its tokens."""
    tokenised = loaded.processor.tokenizer(f" {answer}</s>", add_special_tokens=False)
    length = len(tokenised["input_ids"])
    logits = loaded.model(**inputs).logits[0, -length - 1 : -1]
    wanted = inputs["input_ids"][0, -length:]
    return float(F.cross_entropy(logits, wanted, reduction="sum")), length


@torch.no_grad()
def test_all_questions_at_once_cost_what_stock_transformers_says_one_by_one() -> None:
    model, processor = untrained_demo()
    model.eval()
    learner = LanguageLearner(model, processor, TowerLearner(model, POCKET), tower_share=0.0)
    lesson = Lessons(POCKET.cutter, Split.VALIDATION, 1, 2, 4)[
        3
    ]  # whose positions are not squeezed
    _, figures = learner.loss(lesson)
    chat = ChatPrompt(processor)
    loaded = LoadedModel(model, processor, adapter_of(model, processor), end_tokens(model))
    costs = []
    for place, asked in enumerate(lesson.questions):
        rng = np.random.default_rng([Split.VALIDATION.value, 1, 3, place])
        scene = sample_scene(rng, demo_anyres(), GRIDS[3], ASKED)
        image = Image.open(io.BytesIO(picture(scene, opened_photos()))).convert("RGB")
        for question in asked:
            text = f"{chat.render(question.text)} {question.answer}</s>"
            costs.append(stock_cost(loaded, question.answer, stock_inputs(loaded, [image], [text])))
    cost, tokens = np.sum(costs, axis=0)
    assert float(figures["answers"]) == pytest.approx(cost / tokens, rel=1e-5)
    assert float(figures["exact"]) == 0
    _, squeezed = learner.loss(replace(lesson, squeezed=True))
    assert float(squeezed["answers"]) != pytest.approx(cost / tokens, rel=1e-5)


@torch.no_grad()
def test_notes_in_words_replace_the_image() -> None:
    model, processor = untrained_demo()
    model.eval()
    learner = LanguageLearner(
        model, processor, TowerLearner(model, POCKET), tower_share=0.0, reads=True
    )
    lesson = Lessons(POCKET.cutter, Split.VALIDATION, 1, 2, 3)[3]
    read, _ = learner._reading_loss(lesson)
    loaded = LoadedModel(model, processor, adapter_of(model, processor), end_tokens(model))
    chat = ChatPrompt(processor)
    costs = []
    for question in lesson.questions[0]:
        ids = chat.encode(question.text)
        place = ids.index(model.config.image_token_id)
        notes, answer = (
            processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (lesson.notes[0], f" {question.answer}</s>")
        )
        whole = torch.tensor([[*ids[:place], *notes, *ids[place + 1 :], *answer]])
        costs.append(stock_cost(loaded, question.answer, {"input_ids": whole}))
    cost, tokens = np.sum(costs, axis=0)
    assert float(read) == pytest.approx(cost / tokens, rel=1e-5)


def test_notes_name_everything_and_every_position_once() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, demo_anyres(), GRIDS[seed % 5], ASKED)
        notes = noted(scene, rng)
        for thing in scene.things:
            assert notes.count(f"{thing.colour} {thing.kind} {quarter(scene, thing)}") == 1
            assert 1 <= notes.count(f"{thing.colour} {thing.kind}") <= 3
        if scene.sign is not None:
            assert notes.count(f"sign with {scene.sign.text}") == 1


def test_positions_of_visual_tokens_are_squeezed_unevenly() -> None:
    steps = np.stack([squeezed_steps(240, seed) for seed in range(2000)])
    assert set(np.unique(steps)) == {0, 1}
    stock = (steps == 1).all(axis=1)
    assert stock.mean() == pytest.approx(STOCK_SHARE, abs=0.03)
    lengths = steps[~stock].sum(axis=1)
    assert np.quantile(lengths, 0.05) < 0.1 * 240
    assert np.quantile(lengths, 0.95) > 0.6 * 240
    middle = steps[~stock][:, :120].sum(axis=1) / lengths.clip(1)
    assert middle.std() > 0.1  # where the middle is read from says little about where it is
    assert (squeezed_steps(240, 7) == squeezed_steps(240, 7)).all()


def test_the_tower_of_training_equals_the_family_s() -> None:
    model, processor = untrained_demo()
    lesson = Lessons(POCKET.cutter, Split.TRAIN, 0, 2, 0)[0]
    with torch.no_grad():
        features, class_token = LlavaNextTower(model.model.vision_tower)(lesson.pixels)
        views = adapter_of(model, processor).encode(lesson.tiles, [0, 0])
    flat = torch.cat([view.features for view in views])
    torch.testing.assert_close(features.flatten(0, 1), flat)
    assert class_token.shape == (len(lesson.pixels), demo_spec().vision[0])


def test_positions_are_named_by_the_thumbnail_only() -> None:
    source = torch.tensor([0, 7, 63, 32, 64, 127])
    assert quarters(source).tolist() == [
        [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0.5] * 4, [0.5] * 4,
    ]  # fmt: skip


@torch.no_grad()
def test_the_word_loss_falls_where_tokens_are_the_words_that_name_them() -> None:
    """Embeddings of kinds that are what the projector makes of a patch of them."""
    model, processor = untrained_demo()
    learner = LanguageLearner(model, processor, TowerLearner(model, POCKET), tower_share=0.0)
    lesson = Lessons(POCKET.cutter, Split.TRAIN, 1, 10, 0)[0]
    before, figures = learner.loss(lesson)
    features, _ = learner._tower.run(lesson.pixels)
    shown = learner._packer.pack(lesson.tiles, lesson.labels, features)
    visual = torch.cat([image.embeds for image in shown])
    projected = model.model.multi_modal_projector(features)
    kinds = lesson.label("kinds")
    for kind, word in enumerate(learner._kind_words, start=1):
        if (kinds == kind).any():
            mean = projected[kinds == kind].mean(dim=0) - visual.mean(dim=0)
            model.get_input_embeddings().weight[word] = mean
    after, named = learner.loss(lesson)
    assert after < before
    assert named["words"] > figures["words"]


def test_the_rate_rises_and_falls() -> None:
    stage = Stage("x", 0, steps=100, scenes=1, questions=0, rate=1.0)
    rates = [stage.rate_at(step) for step in range(100)]
    assert rates[0] < rates[3] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.05
    cut = replace(stage, steps=50, horizon=2.0)
    assert [cut.rate_at(step) for step in range(50)] == rates[:50]


def test_averages_skip_what_a_step_lacks() -> None:
    averages = Averages()
    averages.add({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
    averages.add({"a": torch.tensor(2.0)})
    assert averages.means() == {"a": 1.5, "b": 3.0}


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "new"), "--stages", "tower,towre"])
    assert stop.value.code == 2
    assert "no stage 'towre'; there are tower, words" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_stage_without_a_trained_tower_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "new"), "--stages", "language"])
    assert stop.value.code == 2
    assert "has no trained tower; run that stage or give --start" in capsys.readouterr().err


def end(directory: Path) -> dict[str, torch.Tensor]:
    """The model's weights after the last stage."""
    weights: dict[str, torch.Tensor] = torch.load(directory / "together.pt", weights_only=True)[
        "model"
    ]
    return weights


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("short_stages")
def test_training_resumes_where_it_stopped(
    tmp_path: Path,
    train_until: Callable[[list[str], int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the middle of a stage, or after one, and started again: the same weights."""
    main([str(tmp_path / "whole")])
    main([str(tmp_path / "parts"), "--stages", "tower,words"])
    main([str(tmp_path / "parts"), "--stages", "language,together"])
    train_until([str(tmp_path / "stopped")], 10)  # in the third stage
    main([str(tmp_path / "stopped")])
    main([str(tmp_path / "stopped")])
    capsys.readouterr()
    for other in ("stopped", "parts"):
        torch.testing.assert_close(end(tmp_path / other), end(tmp_path / "whole"), msg=other)
    main([str(tmp_path / "parts"), "--stages", "words"])
    written = load_file(tmp_path / "parts/model/model.safetensors")
    words = torch.load(tmp_path / "parts/words.pt", weights_only=True)["model"]["lm_head.weight"]
    assert torch.equal(written["language_model.lm_head.weight"], words.half()), (
        "later stages are not read"
    )
    curve = [
        json.loads(line)
        for line in (tmp_path / "stopped/curve.jsonl").read_text().split("\n")
        if line
    ]
    assert {"stage": "language", "step": 2, "of": 4, "resumed": 1.0} in curve
    assert (tmp_path / "stopped/model/model.safetensors").stat().st_size < 10_000_000
    assert (tmp_path / "stopped/model/processor_config.json").exists()

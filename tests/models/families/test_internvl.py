"""InternVL: what only this family has; `test_contract.py` holds it against stock besides."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from gc2ray.compression.geometry import Geometry, ViewGrid, literal
from gc2ray.compression.registry import build as build_method
from gc2ray.compression.selection import everything, top_k_mask
from gc2ray.compression.views import Views
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel, ModelAdapter
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.internvl import InternVL, InternVLVision, StretchedGrid
from gc2ray.models.flops import AnswerTokens, ExecutionMode, matmul_flops
from gc2ray.models.hf_reference import StockModel, StockSettings
from gc2ray.models.image_processor import Cut, Resize, tile
from gc2ray.models.layers.cpu_attention import compiled_kernel
from gc2ray.models.layers.scores import SCORES
from gc2ray.models.layers.tower import _ViewAttention
from gc2ray.reporting.terminal_tables import parity_lines
from tests.support.parity import checked, write_rows
from tests.support.tiny_internvl import (
    CONTEXT,
    END,
    IMAGES,
    MERGE,
    PATCH,
    SIDE,
    SIZES,
    START,
    build,
    stock,
)

Size = tuple[int, int]
BACKBONES = ("qwen2", "qwen3")
N = SIDE // PATCH // MERGE
TOKENS = N**2
PLACES = (
    (56, 56), (40, 60), (200, 100), (112, 112), (300, 310), (90, 333), (400, 300), (1000, 420),
    (480, 640), (60, 700),
)  # fmt: skip


def load(path: Path) -> LoadedModel:
    return loading.load(str(path), revision=None, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("internvl")
    return {name: build(root / name, name) for name in BACKBONES}


@pytest.fixture(scope="module")
def models(paths: dict[str, Path]) -> dict[str, LoadedModel]:
    return {name: load(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def family(models: dict[str, LoadedModel]) -> InternVL:
    found = models["qwen2"].adapter.family
    assert isinstance(found, InternVL)
    return found


def noise(size: Size, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng([*size, seed])
    return Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(loaded: LoadedModel, images: list[Image.Image], *, alone: bool = True) -> list[Views]:
    adapter = loaded.adapter
    tiles = [tile(image, adapter.family.cropping, alone=alone) for image in images]
    return adapter.encode(tiles, [0] * len(images))


@torch.inference_mode()
def gap_to_stock(loaded: LoadedModel, path: Path, images: list[Image.Image]) -> float:
    """The largest difference from stock's logits behind the last image, uncompressed."""
    adapter, chat = loaded.adapter, ChatPrompt(loaded.processor)
    views = encoded(loaded, images, alone=len(images) == 1)
    packed = adapter.pack(views, [everything(view) for view in views])
    prompt = adapter.embed(chat.encode("What is it?", len(images)), packed)
    ours = loaded.model(inputs_embeds=prompt.embeds[None]).logits[0]
    text = chat.render("What is it?", len(images))
    inputs = stock(path)(images=images, text=[text], return_tensors="pt")
    theirs = loaded.model(**inputs).logits[0]
    assert ours.shape == theirs.shape
    behind = prompt.visual[-1][1] - 1
    return float((ours - theirs)[behind:].abs().max())


# --- views and layout ---------------------------------------------------------------------------


def marked(family: InternVL, tokens: int) -> list[int]:
    ids = family.processor.tokenizer.convert_tokens_to_ids([START, END])
    return [literal(ids[0]), *range(tokens), literal(ids[1])]


def test_an_image_of_one_view_has_no_thumbnail(family: InternVL) -> None:
    geometry = family.geometry((56, 56))
    assert geometry.views == (ViewGrid.whole(N, N),)
    assert geometry.thumbnail is None
    assert geometry.entries.tolist() == marked(family, TOKENS)
    assert family.cropping.cut((56, 56)) == Cut((Resize(56, 56),), (1, 1), None)


def test_a_thumbnail_stands_behind_two_crops(family: InternVL) -> None:
    geometry = family.geometry((112, 56))
    upper, lower = ViewGrid(4, 4, 0, 0, 8, 4), ViewGrid(4, 4, 4, 0, 8, 4)
    assert geometry.views == (upper, lower, ViewGrid.whole(4, 4))
    assert geometry.thumbnail == 2
    assert geometry.entries.tolist() == marked(family, 3 * TOKENS)
    assert (geometry.literals, geometry.newlines, geometry.visual_tokens) == (2, 0, 3 * TOKENS)
    assert family.cropping.cut((112, 56)) == Cut((Resize(112, 56),), (2, 1), 2)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((224, 112), (4, 2)),  # twice as many crops as 2 x 1 x 2 have, and the image fills them
        ((158, 79), (2, 1)),  # a little less than half of them
        ((159, 80), (4, 2)),
        ((100, 150), (2, 3)),
        ((1, 3000), (1, 12)),
        ((3000, 1), (12, 1)),
        ((1, 1), (1, 1)),
    ],
)
def test_grids_by_hand(family: InternVL, size: Size, grid: Size) -> None:
    assert family.cropping.cut(size).grid == grid
    geometry = family.geometry(size)
    assert len(geometry.views) == grid[0] * grid[1] + (grid != (1, 1))


edges = st.one_of(st.integers(1, 6000), st.integers(1, 200))


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(edges, edges), least=st.integers(1, 4), most=st.integers(1, 40))
def test_grids_are_those_of_stock(family: InternVL, size: Size, least: int, most: int) -> None:
    cropping = replace(family.cropping, least=least, most=most)
    columns, rows = get_optimal_tiled_canvas(size, (SIDE, SIDE), least, most)
    assert cropping.grid(size) == (rows, columns)


@settings(max_examples=300, deadline=None)
@given(side=st.integers(1, 400), ratio=st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 3)]))
def test_ties_are_those_of_stock(family: InternVL, side: int, ratio: Size) -> None:
    size = (ratio[0] * side, ratio[1] * side)
    columns, rows = get_optimal_tiled_canvas(size, (SIDE, SIDE), 1, 12)
    assert family.cropping.cut(size).grid == (rows, columns)


@pytest.mark.parametrize("limits", [(2, 6), (1, 1), (3, 3), (1, 30)])
def test_the_image_processor_says_how_many_crops(
    paths: dict[str, Path], tmp_path: Path, limits: Size
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    for file in paths["qwen2"].iterdir():
        (path / file.name).symlink_to(file)
    written = path / "preprocessor_config.json"
    written.unlink()
    written.write_text(json.dumps(IMAGES | {"min_patches": limits[0], "max_patches": limits[1]}))
    found = loading.load_metadata(str(path), dtype="float32").family
    assert isinstance(found.cropping, StretchedGrid)
    assert (found.cropping.least, found.cropping.most) == limits
    for size in SIZES:
        inputs = stock(path)(images=[noise(size)], text=[CONTEXT], return_tensors="pt")
        views = len(tile(noise(size), found.cropping).pixels)
        assert views == len(inputs["pixel_values"]) == len(found.geometry(size).views)


def test_row_text_cannot_spell_out_marks(models: dict[str, LoadedModel], family: InternVL) -> None:
    assert family.markers == (START, END)
    tokenizer = family.processor.tokenizer
    start, end, context = tokenizer.convert_tokens_to_ids([START, END, CONTEXT])
    ids = ChatPrompt(family.processor).encode(f"{END}{START}{CONTEXT} <im{START}g>")
    assert ids.count(context) == 1
    assert not {start, end} & set(ids)


def test_several_images_equal_stock(paths: dict[str, Path], models: Any) -> None:
    """Each is cut and marked as if it were alone."""
    images = [noise(size, seed) for seed, size in enumerate([(200, 100), (56, 56), (300, 310)])]
    for name in BACKBONES:
        assert gap_to_stock(models[name], paths[name], images) < 1e-5
        assert gap_to_stock(models[name], paths[name], images[:2]) < 1e-5


@torch.inference_mode()
def test_checks_compare_with_crops_as_stock_cuts_them(paths: dict[str, Path]) -> None:
    """The files say that images are not cropped, and transformers crops them."""
    path, images = paths["qwen2"], [noise((200, 100)), noise((56, 56))]
    loaded = load(path)
    text = ChatPrompt(loaded.processor).render("What is it?", len(images))
    inputs = stock(path)(images=images, text=[text], return_tensors="pt")
    with StockModel(path, StockSettings("float32", "cpu", max_new_tokens=6)) as model:
        answer = model.answer(images, "What is it?")
    assert list(answer.expanded_ids) == inputs["input_ids"][0].tolist()
    wanted = loaded.model(**inputs, logits_to_keep=1).logits[0, -1]
    behind = len(answer.logits) - len(answer.token_ids)
    torch.testing.assert_close(answer.logits[behind], wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_good_model_passes_its_check(paths: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A mark stands behind the last visual token, from which stock's logits are taken."""
    rows = write_rows(tmp_path / "rows.parquet", ("What is it?", "Which colour?"))
    found = checked(paths[name], rows)
    assert found.passed, parity_lines(found)
    assert found.stock.same_prompts == found.stock.same_answers == 2
    assert found.stock.difference > 0, "compared with itself"


# --- features and scores ------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"vision_feature_layer": -1, "use_mean_pooling": False},
    {"vision_feature_layer": -2, "use_mean_pooling": False},
    {"vision_feature_layer": -3},
    {"vision_feature_layer": 3, "use_mean_pooling": False},
    {"vision_feature_layer": 1},
    {"downsample_ratio": 0.25, "image_seq_length": 4},
], ids=str)  # fmt: skip
def test_features_of_any_layer_equal_stock(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Layer -1 is what the norm behind the tower makes, 3 of 3 is not."""
    path = build(tmp_path / "model", **changes)
    assert gap_to_stock(load(path), path, [noise((200, 100))]) < 1e-5


def expected_scores(layer: Any, state: Tensor) -> Tensor:
    """By the definition: all heads' queries and keys, then token by token."""
    attention, x = layer.attention, layer.layernorm_before(state)
    views, patches, width = x.shape
    heads = attention.num_heads
    query, key = (
        part.view(views, patches, heads, width // heads).transpose(1, 2)
        for part in (attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x)))
    )
    logits = (query @ key.transpose(2, 3) * attention.scale).mean(dim=1)[:, 0, 1:]
    side = SIDE // PATCH
    maps = logits.view(views, side, side)
    tokens = [
        maps[:, MERGE * row : MERGE * (row + 1), MERGE * column : MERGE * (column + 1)]
        for row in range(N)
        for column in range(N)
    ]
    return torch.stack([token.mean(dim=(1, 2)) for token in tokens], dim=1)


@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_scores_are_the_class_tokens_mean_logits(models: Any, name: str) -> None:
    """With a norm over all heads' keys (`qwen3`), and without."""
    loaded = models[name]
    tower, pixels = loaded.model.model.vision_tower, torch.randn(3, 3, SIDE, SIDE)
    state = tower.embeddings(pixels)
    for layer in tower.encoder.layer[:-1]:
        state = layer(state)
    _, scores = loaded.adapter._vision.run(pixels)
    wanted = expected_scores(tower.encoder.layer[-1], state)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 1e-2


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_any_score_can_be_set(models: Any, name: str, score: Any) -> None:
    vision = InternVLVision(models[name].model, models[name].adapter.family, score)
    _, scores = vision.run(torch.randn(2, 3, SIDE, SIDE))
    assert scores.shape == (2, TOKENS)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert scores.std() > 0


def seeing_places(loaded: LoadedModel) -> ModelAdapter:
    """A patch's features are its mean colour, its score the mean red."""
    family = loaded.adapter.family
    vision = InternVLVision(loaded.model, family, "class_token")
    colours = (family.cropping.mean, family.cropping.std)
    mean, std = (torch.tensor(values)[:, None, None] for values in colours)

    def embeddings(pixels: Tensor) -> Tensor:
        patches = F.avg_pool2d(pixels * std + mean, PATCH).flatten(2).transpose(1, 2)
        return F.pad(patches, (0, 0, 1, 0))  # a class token

    vision._tower = SimpleNamespace(embeddings=embeddings)
    vision.layers, vision._norm = [nn.Identity()] * 3, nn.Identity()
    vision._score = lambda inputs: inputs.features[..., 0]
    return ModelAdapter(loaded.model, family, vision, "class_token")


def gradients(size: Size) -> Image.Image:
    """Red is a pixel's place from left to right, green from top to bottom."""
    (height, width) = size
    pixels = np.zeros((height, width, 3))
    pixels[..., 0] = (np.arange(width) + 0.5) / width
    pixels[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


@pytest.mark.parametrize("size", PLACES)
@torch.inference_mode()
def test_kept_tokens_stand_where_their_pixels_are(models: Any, size: Size) -> None:
    """Every patch of every kept token, in the order that the projector reads them."""
    adapter = seeing_places(models["qwen2"])
    (views,) = adapter.encode([tile(gradients(size), adapter.family.cropping)], [0])
    selection = build_method("globalcom2", retention=0.5)(views)
    kept = [entry for entry in selection.entries.tolist() if entry >= 0]
    assert len(kept) > 2
    starts = views.geometry.starts
    for entry in kept:
        index = max(i for i, start in enumerate(starts) if start <= entry)
        view, (row, column) = views.geometry.views[index], divmod(entry - starts[index], N)
        patches = views.features[entry].view(MERGE, MERGE, 3)
        for down in range(MERGE):
            for right in range(MERGE):
                x = ((view.left + column) * MERGE + right + 0.5) / (view.width * MERGE)
                y = ((view.top + row) * MERGE + down + 0.5) / (view.height * MERGE)
                red, green, _ = patches[down, right].tolist()
                assert abs(red - x) < 0.5 / (view.width * MERGE)
                assert abs(green - y) < 0.5 / (view.height * MERGE)
        assert float(views.scores[entry]) == pytest.approx(float(patches[..., 0].mean()), abs=1e-6)


def test_a_view_alone_is_ranked_by_its_own_scores(models: Any) -> None:
    (views,) = encoded(models["qwen2"], [noise((50, 50))])
    assert views.geometry.thumbnail is None
    selection = build_method("globalcom2", retention=0.25)(views)
    best = top_k_mask(views.scores[None], torch.tensor([TOKENS // 4]))[0].nonzero().flatten()
    assert selection.entries[1:-1].tolist() == best.tolist()


# --- speed and cost -----------------------------------------------------------------------------


def run_of(vision: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    features, scores = vision.run(pixels)
    return vision.project(features.flatten(0, 1)), scores


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("name", BACKBONES)
@torch.inference_mode()
def test_packed_layers_are_transformers(
    models: Any, name: str, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class token, scales and norms included; compiled attention where nothing is normalised."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    model, family = models[name].model, models[name].adapter.family
    plain, packed = (InternVLVision(model, family, "class_token") for _ in range(2))
    packed.freeze()
    compiled = compiled_kernel() is not None and name == "qwen2"
    for layer, own in zip(packed.layers, model.model.vision_tower.encoder.layer, strict=True):
        assert isinstance(layer.attention, _ViewAttention) == compiled
        assert not any(isinstance(module, nn.Linear) for module in layer.modules())
        assert isinstance(own.attention.q_proj, nn.Linear)
        assert layer.lambda_1 is own.lambda_1
    pixels = torch.randn(3, 3, SIDE, SIDE)
    for ours, theirs in zip(run_of(packed, pixels), run_of(plain, pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_only_layers_that_are_needed_are_packed_and_run(tmp_path: Path) -> None:
    loaded = load(build(tmp_path / "model", vision_feature_layer=-3))
    vision: Any = loaded.adapter._vision
    plain = [any(isinstance(m, nn.Linear) for m in layer.modules()) for layer in vision.layers]
    assert plain == [False, False, True], "two for the scores, of which one for the features"
    assert loaded.adapter.shape.tower.run_layers == 2
    vision.layers[2] = lambda _: pytest.fail("the last layer runs")
    vision.run(torch.randn(1, 3, SIDE, SIDE))


def counted(work: Callable[[], Any]) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", BACKBONES)
def test_operations_are_those_that_torch_counts(paths: dict[str, Path], name: str) -> None:
    loaded = load(paths[name])
    model, shape = loaded.model, loaded.adapter.shape
    model.set_attn_implementation("eager")
    tower = shape.tower
    assert (tower.layers, tower.run_layers, tower.patches, tower.visual_tokens) == (3, 3, 64, 16)
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    assert counted(lambda: model.model.vision_tower(pixels)) == tower.whole(2)
    assert tower.whole(2) == replace(tower, score_products=0).needed(2)
    projector, block = model.model.multi_modal_projector, MERGE**2 * tower.width
    assert counted(lambda: projector(torch.zeros(7, block))) == tower.projector(7)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    inputs = stock(paths[name])(images=[noise((200, 100))], text=[CONTEXT], return_tensors="pt")
    views, length = len(inputs["pixel_values"]), inputs["input_ids"].shape[1]
    answer = AnswerTokens(views=views, projected=views * TOKENS, prompt=length, output=1)
    stages = matmul_flops(shape, answer, ExecutionMode.EAGER)
    found = counted(lambda: model(**inputs, logits_to_keep=1))
    assert sum(stages.values()) == pytest.approx(found, rel=1e-3)


def test_views_are_counted_in_merged_tokens(models: Any) -> None:
    (views,) = encoded(models["qwen2"], [noise((200, 100))])
    geometry: Geometry = views.geometry
    shape = models["qwen2"].adapter.shape
    assert views.features.shape == (geometry.tokens, MERGE**2 * shape.tower.width)
    per_view = views.features.nbytes // len(geometry.views)
    assert shape.needs().features_per_view == per_view

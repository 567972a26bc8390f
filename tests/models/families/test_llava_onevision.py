"""LLaVA-OneVision: where tokens lie, features and scores, and several images in a prompt."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gc2ray.compression.geometry import NEWLINE
from gc2ray.compression.registry import COMPRESSORS, build
from gc2ray.compression.selection import everything
from gc2ray.compression.views import Views
from gc2ray.models import loading
from gc2ray.models.adapter import SCORE_DEVIATION, LoadedModel, pixel_table
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.llava_onevision import LlavaOnevision
from gc2ray.models.flops import AnswerTokens, ExecutionMode, matmul_flops
from gc2ray.models.image_processor import STRIP_PIXELS, Cropping, Tiles, tile
from gc2ray.models.registry import adapter_of
from tests.support import tiny_onevision
from tests.support.parity import checked
from tests.support.rows import encoded as png
from tests.support.rows import picture
from tests.support.tiny_onevision import SIDE, SIZES, TOKENS

Size = tuple[int, int]
TOLERANCE = 1e-5
"""Largest difference of logits and features, float32."""
SHOWN = [size for size in SIZES if min(size) >= 60]
METHODS = [name for name in COMPRESSORS if name != "globalcom2-reference"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model by changes of its config, and stock's processor."""

    @cache
    def of(pinpoints: tuple[Size, ...] = (), views: int = 0) -> tuple[LoadedModel, Any]:
        directory = tmp_path_factory.mktemp("onevision")
        changes: dict[str, Any] = {}
        if pinpoints:
            changes["image_grid_pinpoints"] = [[SIDE * r, SIDE * c] for r, c in pinpoints]
        if views:
            changes["vision_aspect_ratio"] = f"anyres_max_{views}"
        tiny_onevision.build(directory, **changes)
        loaded = loading.load(str(directory), revision=None, dtype="float32", device="cpu")
        return loaded, tiny_onevision.stock(directory)

    return of


@pytest.fixture
def loaded(tiny: Any) -> LoadedModel:
    model: LoadedModel = tiny()[0]
    return model


def encoded(loaded: LoadedModel, images: list[Image.Image], *, alone: bool = True) -> list[Views]:
    cropping = loaded.adapter.family.cropping
    tiles = [tile(image, cropping, alone=alone) for image in images]
    with torch.inference_mode():
        return loaded.adapter.encode(tiles, [*range(len(images))])


def normalised(tiles: Tiles, cropping: Cropping) -> Tensor:
    table, places = pixel_table(cropping), torch.from_numpy(tiles.pixels).long()
    return torch.stack([table[channel][places[..., channel]] for channel in range(3)], dim=1)


# --- where tokens lie ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, (500, 450), (450, 700)])
@torch.inference_mode()
def test_a_token_mixes_patches_around_its_own_place(loaded: LoadedModel, size: Size) -> None:
    """The weighted centre of the canvas patches in a token is the token's centre."""
    adapter, family = loaded.adapter, cast(LlavaOnevision, loaded.adapter.family)
    geometry, canvas = family.geometry(size), family.canvas(size)
    (rows, columns), (height, width) = canvas.grid, canvas.side
    places = torch.zeros(1 + canvas.crops, TOKENS**2, 2)
    for crop in range(canvas.crops):
        for patch in range(TOKENS**2):
            top, left = crop // columns * height, crop % columns * width
            row, column = top + patch // width + 0.5, left + patch % width + 0.5
            places[1 + crop, patch] = torch.tensor([row, column])
    assert rows * columns == canvas.crops
    scores = places[..., 0] + 100 * places[..., 1]
    values, scored = adapter._vision.arranged(places, scores, geometry, size)
    torch.testing.assert_close(scored, values[:, 0] + 100 * values[:, 1])
    parts = values.split(list(geometry.counts))
    for view, found in zip(geometry.views[1:], parts[1:], strict=True):
        down = (torch.arange(view.rows) + view.top + 0.5) * canvas.height / max(1, view.height)
        along = (torch.arange(view.columns) + view.left + 0.5) * canvas.width / max(1, view.width)
        expected = torch.cartesian_prod(down + canvas.rows[0], along + canvas.columns[0])
        torch.testing.assert_close(found, expected.view(-1, 2), rtol=0, atol=1e-4)
    assert torch.equal(parts[0], places[0])


class MeanColours:
    """A projector and tower that return the mean colour of each patch, and its redness."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._mean = torch.tensor(loaded.adapter.family.cropping.mean)[:, None, None]
        self._std = torch.tensor(loaded.adapter.family.cropping.std)[:, None, None]

    def run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        colours = F.avg_pool2d(pixels * self._std + self._mean, tiny_onevision.PATCH)
        features = colours.flatten(2).transpose(1, 2)
        return features, features[..., 0] + features[..., 1]


def map_of(size: Size) -> Image.Image:
    """Red grows downwards, green to the right, blue is full: it tells the image from padding."""
    down = (np.arange(size[0]) + 0.5) / size[0]
    along = (np.arange(size[1]) + 0.5) / size[1]
    red, green = np.meshgrid(down, along, indexing="ij")
    pixels = np.stack([red, green, np.ones(size)], axis=2)
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("method", ["globalcom2", "local"])
@pytest.mark.parametrize("size", [*SHOWN, (500, 450), (450, 700), (130, 150)])
def test_kept_tokens_lie_where_their_pixels_were(
    loaded: LoadedModel, size: Size, method: str, *, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pixels to the selection; an image's position is its colour."""
    monkeypatch.setattr(loaded.adapter._vision, "run", MeanColours(loaded).run)
    image = encoded(loaded, [map_of(size)], alone=alone)[0]
    geometry = image.geometry
    selection = build(method, retention=0.5)(image)
    kept = selection.entries[selection.entries >= 0].long()
    owner = np.searchsorted(geometry.starts, kept.numpy(), side="right") - 1
    assert len(set(owner)) == len(geometry.views)
    for token, view_index in zip(kept.tolist(), owner.tolist(), strict=True):
        view, at = geometry.views[view_index], token - geometry.starts[view_index]
        row, column = view.top + at // view.columns, view.left + at % view.columns
        red, green, blue = image.features[token].tolist()
        near = 0.45 if alone else 0.55  # tokens; padding is rounded to whole ones
        if alone or (0 < row < view.height - 1 and 0 < column < view.width - 1):
            assert red / blue * view.height == pytest.approx(row + 0.5, abs=near)
            assert green / blue * view.width == pytest.approx(column + 0.5, abs=near)


# --- features and scores ------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_features_are_those_of_the_model(tiny: Any, size: Size) -> None:
    loaded, stock = tiny()
    inputs = stock(images=[picture(size)], text=["<image>"], return_tensors="pt")
    expected = loaded.model.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"],
        vision_aspect_ratio=loaded.model.config.vision_aspect_ratio,
    ).pooler_output[0]  # fmt: skip
    views = encoded(loaded, [picture(size)])
    (packed,) = loaded.adapter.pack(views, [everything(views[0])])
    torch.testing.assert_close(packed, expected, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_scores_are_the_distances_of_patches_scaled_like_features(loaded: LoadedModel) -> None:
    """-cos(x, mean of x) of what the projector gets, then what `interpolate` makes of it.

    Standardised then, over the image.
    """
    size = (400, 300)
    loaded = replace(loaded, adapter=adapter_of(loaded.model, loaded.processor, "mean_distance"))
    tower, cropping = loaded.model.model.vision_tower, loaded.adapter.family.cropping
    pixels = normalised(tile(picture(size), cropping), cropping)
    x = tower(pixels, output_hidden_states=True).hidden_states[-1]
    patches = -F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)
    image = encoded(loaded, [picture(size)])[0]
    crops = patches[1:].view(4, 3, 6, 6).transpose(1, 2).reshape(1, 1, 24, 18)
    scaled = F.interpolate(crops, (13, 10), mode="bilinear").flatten()
    lines = image.geometry.entries[36:].reshape(13, 11)[:, :10].ravel()
    wanted = torch.cat([patches[0], scaled])
    wanted = SCORE_DEVIATION * (wanted - wanted.mean()) / wanted.std(correction=0)
    found = torch.cat([image.scores[:36], image.scores[lines]])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_features_take_the_memory_that_is_planned(loaded: LoadedModel) -> None:
    image = encoded(loaded, [picture((84, 84))], alone=False)[0]
    assert image.features.nbytes == loaded.adapter.needs().features_per_view


# --- several images -----------------------------------------------------------------------------

SEVERAL = [(84, 84), (60, 190), (200, 100), (7, 200), (1, 1)]


@pytest.mark.parametrize("count", [2, 3, 5])
@torch.inference_mode()
def test_several_images_equal_stock(tiny: Any, count: int) -> None:
    loaded, stock = tiny()
    adapter, model = loaded.adapter, loaded.model
    images = [picture(size, seed) for seed, size in enumerate(SEVERAL[:count])]
    chat = ChatPrompt(loaded.processor)
    inputs = stock(
        images=[images], text=[chat.render("Which is larger?", count)], return_tensors="pt"
    )
    views = encoded(loaded, images, alone=False)
    packed = adapter.pack(views, [everything(view) for view in views])
    assert [len(part) for part in packed] == [37] * count
    prompt = adapter.embed(chat.encode("Which is larger?", count), packed)
    assert len(prompt) == inputs["input_ids"].shape[1]
    expected, found = model(**inputs).logits, model(inputs_embeds=prompt.embeds[None]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 16}
    written = model.generate(**inputs, **options)[0, len(prompt) :]
    assert torch.equal(model.generate(inputs_embeds=prompt.embeds[None], **options)[0], written)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=2, max_size=3))
def test_squares_equal_stocks(tiny: Any, sizes: list[Size]) -> None:
    check_squares(tiny, sizes)


def test_squares_of_thin_images_equal_stocks(tiny: Any) -> None:
    check_squares(tiny, [(1, 3000), (3000, 1), (7, 200), (1, 1), (85, 84)])


def test_squares_in_strips_equal_stocks(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gc2ray.models.image_processor.STRIP_PIXELS", 1000)  # three to eleven rows
    check_squares(tiny, [(90, 300), (300, 90), (200, 200), (84, 84), (1, 90)])


def test_the_square_of_a_long_image_takes_little_memory(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have 10^10 pixels."""
    new = Image.new

    def small(mode: str, size: Size, *colour: Any) -> Image.Image:
        assert size[0] * size[1] <= STRIP_PIXELS
        return new(mode, size, *colour)

    cropping, image = tiny()[0].adapter.family.cropping, new("RGB", (100_000, 2))
    monkeypatch.setattr("gc2ray.models.image_processor.Image.new", small)
    (square,) = tile(image, cropping, alone=False).pixels
    fill = [int(255 * mean) for mean in tiny_onevision.MEAN]
    assert square[0, 0].tolist() == square[-1, -1].tolist() == fill


def check_squares(tiny: Any, sizes: list[Size]) -> None:
    loaded, stock = tiny()
    cropping = loaded.adapter.family.cropping
    draw = np.random.default_rng(len(sizes))
    images = [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    expected = stock.image_processor([images], return_tensors="pt")["pixel_values"]
    ours = [normalised(tile(image, cropping, alone=False), cropping) for image in images]
    assert torch.equal(torch.stack(ours), expected)


def test_row_text_cannot_name_images_or_videos(loaded: LoadedModel) -> None:
    config = loaded.model.config
    ids = ChatPrompt(loaded.processor).encode("<video> or <image>?")
    assert ids.count(config.image_token_id) == 1
    assert config.video_token_id not in ids


def test_padding_of_squares_is_never_kept(loaded: LoadedModel) -> None:
    images = encoded(loaded, [picture(size) for size in SEVERAL], alone=False)
    for method in {*METHODS} - {"none"}:
        for image, selection in zip(images, build(method, retention=0.9).many(images), strict=True):
            kept = selection.entries[selection.entries >= 0].long()
            assert image.index.valid[kept].all()
            assert int(selection.entries[-1]) == NEWLINE


# --- crops without tokens -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pinpoints", "size", "views"),
    [(((3, 1),), (60, 150), 4), (((1, 3),), (150, 60), 4), (((5, 1),), (84, 400), 1)],
)
@torch.inference_mode()
def test_crops_of_padding_alone_have_no_tokens(
    tiny: Any, pinpoints: tuple[Size, ...], size: Size, views: int
) -> None:
    """Canvases that published models never choose for such images."""
    loaded, stock = tiny(pinpoints, views)
    adapter, model, image = loaded.adapter, loaded.model, picture(size)
    counts = adapter.family.geometry(size).counts
    assert 0 in counts[:2]
    assert counts[-1] == 0
    assert sum(counts[1:]) > 0
    chat = ChatPrompt(loaded.processor)
    inputs = stock(images=[image], text=[chat.render("Why?")], return_tensors="pt")
    encoded_views = encoded(loaded, [image])
    packed = adapter.pack(encoded_views, [everything(view) for view in encoded_views])
    prompt = adapter.embed(chat.encode("Why?"), packed)
    expected, found = model(**inputs).logits, model(inputs_embeds=prompt.embeds[None]).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    for method in METHODS:
        kept = build(method, retention=0.3)(encoded_views[0]).kept_per_view(
            encoded_views[0].geometry
        )
        assert kept[0] > 0
        if method != "thumbnail":
            assert [number > 0 for number in kept] == [number > 0 for number in counts]


def test_a_canvas_scaled_to_no_row_leaves_the_thumbnail(tiny: Any) -> None:
    loaded, _ = tiny(((1, 20),), 1)
    image = encoded(loaded, [picture((15, 1680))])[0]
    assert image.geometry.views[1].height == 0
    assert image.geometry.entries.tolist() == [*range(36)]


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "several"), [((200, 100), 0), ((400, 300), 0), ((90, 100), 3)])
def test_operations_are_those_that_torch_counts(tiny: Any, size: Size, several: int) -> None:
    """Stock transformers from pixels to the first new token, with all tokens projected."""
    loaded, stock = tiny()
    model, images = loaded.model, [picture(size)] * max(1, several)
    text = [ChatPrompt(loaded.processor).render("Why?", len(images))]
    inputs = stock(images=[images], text=text, return_tensors="pt")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
    family = loaded.adapter.family
    geometry = family.geometry(size, alone=not several)
    views = len(geometry.views) * len(images)
    length = inputs["input_ids"].shape[1]
    answer = AnswerTokens(views, projected=geometry.visual_tokens, prompt=length, output=1)
    tower = loaded.adapter.shape.tower
    assert (tower.run_layers, tower.layers, tower.class_token) == (3, 3, False)
    stages = matmul_flops(loaded.adapter.shape, answer, ExecutionMode.EAGER)
    assert sum(stages.values()) == counter.get_total_flops()


def test_check_leaves_out_images_that_stock_would_pad_to_too_much(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they are scaled where they show; a line of a million pixels is a square of 3 TB."""
    monkeypatch.setattr("gc2ray.engine.parity.check.STOCK_CANVAS", 300 * 300)
    line, small = ({"bytes": png(picture(size)), "path": None} for size in ((301, 2), (60, 90)))
    rows = [[line, small], [small, small], [line]]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    source, model = tmp_path / "rows.parquet", Path(loaded.model.config._name_or_path)
    pq.write_table(pa.table({"image": pa.array(rows, kind), "prompt": ["Why?"] * 3}), source)
    found = checked(model, source)
    assert found.passed
    assert (found.prompts, found.stock.prompts) == (3, 2)
    (left_out,) = found.left_out
    assert left_out.endswith(f"#0: stock transformers would pad an image to {301 * 301} pixels")

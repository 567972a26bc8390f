"""Idefics3 and SmolVLM beyond the contract: sizes, markers, merged places, several images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from gc2ray.compression.geometry import LITERAL, Geometry, ViewGrid, literal
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.packing import Packing
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Score
from gc2ray.core.config.job import Cluster
from gc2ray.core.records import ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.idefics3 import Idefics3, Idefics3Vision, ScaledCanvas
from gc2ray.models.families.tiny_smolvlm import FAKE, WHOLE, TinySmolVlmSpec, untrained_smolvlm
from gc2ray.models.image_processor import Cut, Resize, tile
from gc2ray.models.processor import Processor
from gc2ray.models.registry import adapter_of
from tests.support.rows import encoded, make_recipe, picture
from tests.support.tiny_idefics3 import build_idefics3, build_smolvlm, stock_idefics3, stock_smolvlm

Size = tuple[int, int]
HALF = (0.5, 0.5, 0.5)
SPEC = TinySmolVlmSpec()
"""Views of 56 pixels and 4 x 4 tokens; images of 4 views along the longer side."""


def canvas(longest: int = SPEC.longest, side: int = SPEC.tile) -> ScaledCanvas:
    return ScaledCanvas(side, 1, HALF, HALF, 1 / 255, longest)


def untrained(spec: TinySmolVlmSpec = SPEC, **images: Any) -> LoadedModel:
    model, files = untrained_smolvlm(spec)
    for name, value in images.items():
        setattr(files.image_processor, name, value)
    processor = Processor.from_transformers(files)
    return LoadedModel(model.eval(), processor, adapter_of(model, processor), ())


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return untrained()


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def stock_and_ours(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, LoadedModel]:
    """transformers' processor, and the checkpoint as gc2ray loads it."""
    path = tmp_path_factory.mktemp(request.param)
    build, stock = {
        "idefics3": (build_idefics3, stock_idefics3),
        "smolvlm": (build_smolvlm, stock_smolvlm),
    }[request.param]
    build(path)
    return stock(path), loading.load(str(path), revision=None, dtype="float32", device="cpu")


# --- Cutting ------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    """4 views along the longer side; the other is scaled alike, made even and raised to views."""
    assert canvas().cut((100, 200)) == Cut((Resize(112, 224), Resize(112, 224)), (2, 4), 8, 2)
    assert canvas().cut((300, 100)) == Cut((Resize(224, 74), Resize(224, 112)), (4, 2), 8, 2)
    assert canvas().cut((1, 1)) == Cut((Resize(224, 224), Resize(224, 224)), (4, 4), 16, 2)
    assert canvas(longest=56).cut((9, 30)) == Cut((Resize(16, 56), Resize(56, 56)), (0, 0), 0, 2)


edge = st.one_of(st.integers(1, 9000), st.integers(1, 300))
processors = st.sampled_from([(224, 56), (250, 65), (130, 48), (201, 84), (56, 56), (5000, 512)])


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(edge, edge), processor=processors)
@example(size=(101, 224), processor=(224, 56))  # 224 / (224 / 101) is not 224 * 101 / 224
@example(size=(134, 10), processor=(201, 84))
def test_sizes_and_grids_are_those_of_stock(size: Size, processor: Size) -> None:
    """Of its own functions in `_preprocess`, over images that take no memory."""
    longest, side = processor
    ours = canvas(longest, side)
    stock = Idefics3ImageProcessorPil(
        size={"longest_edge": longest}, max_image_size={"longest_edge": side}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PilBackend, "resize", _resized_without_pixels)
        first = stock.resize(_without_pixels(*size), SizeDict(longest_edge=longest))
        second = stock.resize_for_vision_encoder(first, side)
        views, rows, columns = stock.split_images(second, {"longest_edge": side})
    assert ours.resizes(size) == (first.shape[1:], second.shape[1:])
    assert ours.grid(size) == (rows, columns)
    assert ours.cut(size).views == len(views)


def _without_pixels(height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (3, height, width))


def _resized_without_pixels(_: Any, __: np.ndarray, size: SizeDict, **___: Any) -> np.ndarray:
    return _without_pixels(size.height, size.width)


def test_stocks_other_grid_rule_is_not_followed() -> None:
    """`get_number_of_image_patches` starts the second resize from a size that was not rounded."""
    stock = Idefics3ImageProcessorPil(
        size={"longest_edge": 250}, max_image_size={"longest_edge": 65}
    )
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 400, (400, 2))]
    told = [tuple(stock.get_number_of_image_patches(*size, {})[1:]) for size in sizes]
    made = [canvas(250, 65).grid(size) for size in sizes]
    size = next(size for size, a, b in zip(sizes, told, made, strict=True) if a != b)
    cut = stock(Image.new("RGB", size[::-1]), return_row_col_info=True)
    assert (cut["rows"][0][0], cut["cols"][0][0]) == canvas(250, 65).grid(size)


def test_a_view_of_zeros_is_a_view() -> None:
    """Stock takes it for padding of the batch, and lacks its tokens then."""
    loaded = untrained(image_mean=(0.0, 0.0, 0.0))
    image = Image.new("RGB", (100, 200))
    image.paste((255, 255, 255), (0, 0, 100, 60))
    tiles = tile(image, loaded.adapter.family.cropping)
    black = [not view.any() for view in tiles.pixels]
    assert 0 < sum(black) < len(black)
    with torch.inference_mode():
        (views,) = loaded.adapter.encode([tiles], [0])
        pixels = torch.from_numpy(tiles.pixels).permute(0, 3, 1, 2)[None] / 255 / 0.5
        theirs = loaded.model.model.get_image_features(pixels).pooler_output
        inner = loaded.model.model
        states = inner.vision_model(pixels[0]).last_hidden_state  # told of no padding
        expected = inner.connector(states).flatten(0, 1)
        torch.testing.assert_close(loaded.adapter._vision.project(views.features), expected)
    assert views.geometry.tokens == SPEC.tokens * len(black)
    assert sum(map(len, theirs)) == SPEC.tokens * (len(black) - sum(black))


# --- Layout -------------------------------------------------------------------------------------


def words(geometry: Geometry, entries: Any, processor: Processor) -> list[str]:
    """Literals as texts, and runs of visual tokens as the views that they are of."""
    found: list[str] = []
    for entry in entries:
        view = f"view {int(np.searchsorted(geometry.starts, entry, side='right')) - 1}"
        text = processor.tokenizer.convert_ids_to_tokens(LITERAL - entry) if entry < 0 else view
        if entry < 0 or found[-1:] != [text]:
            found.append(text)
    return found


def test_two_rows_by_hand(tiny: LoadedModel) -> None:
    """112 x 168, cut with half as many views: 2 x 2 crops, thumbnail last."""
    family = untrained(replace(SPEC, longest=112)).adapter.family
    geometry = family.geometry((80, 100))
    sides = [(0, 0), (0, 4), (4, 0), (4, 4)]
    crops = [ViewGrid(4, 4, top, left, 8, 8) for top, left in sides]
    assert geometry.views == (*crops, ViewGrid.whole(4, 4))
    assert geometry.thumbnail == 4
    assert geometry.newlines == 0
    assert words(geometry, geometry.entries.tolist(), tiny.processor) == [
        FAKE, "<row_1_col_1>", "view 0", FAKE, "<row_1_col_2>", "view 1", "Ċ",
        FAKE, "<row_2_col_1>", "view 2", FAKE, "<row_2_col_2>", "view 3", "ĊĊ",
        FAKE, WHOLE, "view 4", FAKE,
    ]  # fmt: skip
    literals = geometry.entries <= LITERAL
    spans = np.frombuffer(geometry.spans, dtype=np.int16).reshape(-1, 2)[literals].tolist()
    assert spans == [
        [0, 0], [0, 0], [1, 1], [1, 1], [0, 1],
        [2, 2], [2, 2], [3, 3], [3, 3], [2, 4],
        [4, 4], [4, 4], [0, 4],
    ]  # fmt: skip


def test_one_view_by_hand() -> None:
    loaded = untrained(replace(SPEC, longest=56))
    geometry = loaded.adapter.family.geometry((30, 56))
    assert geometry.views == (ViewGrid.whole(4, 4),)
    assert geometry.thumbnail == 0
    assert geometry.crops == ()
    listed = words(geometry, geometry.entries.tolist(), loaded.processor)
    assert listed == [FAKE, WHOLE, "view 0", FAKE]
    views = Views(torch.zeros(16, 1), torch.arange(16.0), geometry, (30, 56))
    kept = GlobalCom2(0.25)(views)
    assert kept.entries[kept.entries >= 0].tolist() == [12, 13, 14, 15]
    assert len(kept.entries) == 4 + 3, "markers stay"


def test_line_breaks_that_do_not_join_stand_for_the_same_views(tiny: LoadedModel) -> None:
    """With a tokenizer that knows no pair of line breaks."""
    spec = replace(SPEC, longest=112, corpus=("a picture",))
    loaded = untrained(spec)
    geometry = loaded.adapter.family.geometry((80, 100))
    listed = words(geometry, geometry.entries.tolist(), loaded.processor)
    assert listed[-6:-3] == ["Ċ", "Ċ", FAKE]
    spans = np.frombuffer(geometry.spans, dtype=np.int16).reshape(-1, 2)
    literals = spans[geometry.entries <= LITERAL].tolist()
    assert literals[-5:-3] == [[2, 4], [2, 4]]


def test_markers_go_with_their_views(tiny: LoadedModel) -> None:
    geometry = untrained(replace(SPEC, longest=112)).adapter.family.geometry((80, 100))
    views = Views(torch.zeros(80, 1), torch.zeros(80), geometry, (80, 100))
    packing = Packing(markers="kept_views")

    def left(*kept: int) -> list[str]:
        entries, places = views.index.entries, []
        for place, entry in enumerate(entries.tolist()):
            if entry <= LITERAL or entry in kept:
                places.append(place)
        at = torch.tensor(places)
        (packed,) = packing.apply([views], [Selection(entries[at], at)])
        return words(geometry, packed.entries.tolist(), tiny.processor)

    opening = [FAKE, "<row_1_col_2>", "view 1", "Ċ"]
    assert left(16, 64) == [*opening, "ĊĊ", FAKE, WHOLE, "view 4", FAKE]
    assert left(17) == [*opening, FAKE]
    assert left(40) == [FAKE, "<row_2_col_1>", "view 2", "ĊĊ", FAKE]
    assert left() == []


def test_names_of_markers_are_the_tokenizers() -> None:
    model, files = untrained_smolvlm(SPEC)
    files.tokenizer.add_special_tokens({"global_image_token": "<row_6_col_6>"})
    processor = Processor.from_transformers(files)
    geometry = adapter_of(model, processor).family.geometry((80, 100))
    listed = words(geometry, geometry.entries.tolist(), processor)
    assert listed[-4:] == [FAKE, "<row_6_col_6>", "view 16", FAKE]
    assert WHOLE not in listed


def test_row_text_makes_no_markers(stock_and_ours: tuple[Any, LoadedModel]) -> None:
    """Also where a checkpoint has them as plain tokens, as the Idefics3 here."""
    _, loaded = stock_and_ours
    plain, family = loaded.processor.tokenizer, loaded.adapter.family
    assert {FAKE, WHOLE, "<row_1_col_1>", "<row_6_col_6>"} <= {*family.markers}
    engine = Engine(loaded, make_recipe("unused"), Cluster())
    spelled = f"Is <row_1_col_2> {WHOLE} or <row_6_<row_1_col_1>col_6>?"
    image = ImageRef(encoded(picture((60, 90))))
    (prompt,) = engine.prompts([Request("0", "test", 0, (image,), (spelled,))])
    markers = {*plain.convert_tokens_to_ids(list(family.markers))}
    assert markers.isdisjoint(prompt.token_ids)
    assert markers & {*plain(spelled)["input_ids"]}, "this test could not fail"


def test_markers_that_the_tokenizer_lacks_are_kept_out_too() -> None:
    """They are several tokens there, in the row's text as around crops."""
    model, files = untrained_smolvlm(SPEC)
    saved = json.loads(files.tokenizer.backend_tokenizer.to_str())
    saved["added_tokens"] = [
        t for t in saved["added_tokens"] if not t["content"].startswith("<row")
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(saved)))
    processor = replace(Processor.from_transformers(files), tokenizer=tokenizer)
    family = Idefics3(model.config, processor)
    chat = ChatPrompt(processor, family.markers)
    grid = family.cropping.grid((4000, 4000))
    for marker in ("<row_1_col_1>", f"<row_{grid[0]}_col_{grid[1]}>"):
        assert marker not in chat.neutralise(f"see {marker} here")
    assert "<row_9_col_9>" in chat.neutralise("see <row_9_col_9> here"), "there is no such crop"


def test_prompts_without_images_are_stocks(stock_and_ours: tuple[Any, LoadedModel]) -> None:
    """A space follows the role there, and none before an image."""
    stock, loaded = stock_and_ours
    content = [{"type": "text", "text": "What is it?"}]
    text = loaded.processor.render([{"role": "user", "content": content}])
    chat = ChatPrompt(loaded.processor, loaded.adapter.family.markers)
    ids = stock(text=[text], add_special_tokens=False)["input_ids"][0]
    assert chat.encode("What is it?", images=0) == list(ids)
    assert "User: What" in text
    assert "User:<image>What" in chat.render("What is it?")


# --- Tower --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.inference_mode()
def test_features_are_those_that_stock_projects(scale: int, dtype: torch.dtype) -> None:
    """Merged by 2, 3 and 4; patches of 7 do not fill views of 88 pixels."""
    model, files = untrained_smolvlm(TinySmolVlmSpec(tile=88, scale=scale))
    processor, pixels = Processor.from_transformers(files), torch.randn(3, 3, 88, 88).to(dtype)
    adapter = adapter_of(model.to(dtype).eval(), processor)
    vision: Any = adapter._vision
    features, scores = vision.run(pixels)
    tokens = (12 // scale) ** 2
    assert features.shape == (3, tokens, 32 * scale**2)
    assert (scores.shape, scores.dtype) == ((3, tokens), torch.float32)
    theirs = torch.cat([*model.model.get_image_features(pixels[None]).pooler_output])
    torch.testing.assert_close(vision.project(features).flatten(0, 1), theirs)
    adapter.freeze()
    for packed, plain in zip(vision.run(pixels), (features, scores), strict=True):
        torch.testing.assert_close(packed, plain)


class Glimpses(nn.Module):
    """A tower whose features are the mean colours of patches: red is the row, green the column."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self._patch, self.encoder = patch, nn.Module()
        self.encoder.layers = nn.ModuleList([Unchanged(), Unchanged()])
        self.post_layernorm = nn.Identity()

    def embeddings(self, pixels: Tensor, patch_attention_mask: Tensor) -> Tensor:
        assert patch_attention_mask.all()
        means = nn.functional.avg_pool2d(pixels, self._patch)
        return means.flatten(2).transpose(1, 2).contiguous()


class Unchanged(nn.Module):
    def forward(self, state: Tensor, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None
        return state


def gradient(size: Size) -> Image.Image:
    """Red says how far down a pixel lies, green how far to the right."""
    rows, columns = ((np.arange(side) + 0.5) / side * 255 for side in size)
    shades = np.zeros((*size, 3))
    shades[..., 0], shades[..., 1] = rows[:, None], columns[None, :]
    return Image.fromarray(shades.round().astype(np.uint8))


def glimpsed(spec: TinySmolVlmSpec, size: Size) -> tuple[Views, Tensor]:
    """An image by that tower, and where the pixels of each token's patches lie, (N, s², 2)."""
    loaded = untrained(spec)
    adapter: Any = loaded.adapter
    model = loaded.model
    model.model.vision_model = Glimpses(spec.patch)
    adapter._vision = Idefics3Vision(model, adapter.family, "mean_distance")
    adapter._vision._score = lambda inputs: inputs.features @ torch.tensor([10.0, 1.0, 0.0])
    (views,) = adapter.encode([tile(gradient(size), adapter.family.cropping)], [0])
    places = views.features.view(len(views.features), spec.scale**2, 3)[..., :2]
    return views, places / 2 + 0.5


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize(
    "size",
    [
        (56, 56), (60, 90), (200, 100), (112, 112), (300, 310), (90, 333), (400, 300), (24, 200),
        (200, 24), (1000, 420), (30, 33),
    ],
)  # fmt: skip
@torch.inference_mode()
def test_a_token_lies_where_the_pixels_that_made_it_lie(size: Size, scale: int) -> None:
    """Of every token that is kept: the mean of its patches' places is its own in the image."""
    spec = replace(SPEC, scale=scale)
    views, patches = glimpsed(spec, size)
    selection = GlobalCom2(0.25)(views)
    kept = selection.entries[selection.entries >= 0].tolist()
    assert len(kept) > 0
    for token in (*kept, *range(views.geometry.tokens)):
        view = int(np.searchsorted(views.geometry.starts, token, side="right")) - 1
        grid, own = views.geometry.views[view], token - views.geometry.starts[view]
        row, column = own // grid.columns + grid.top, own % grid.columns + grid.left
        place = ((row + 0.5) / grid.height, (column + 0.5) / grid.width)
        apart = (patches[token].mean(0) - torch.tensor(place)).abs()
        allowed = 0.4 / torch.tensor([grid.height, grid.width])
        assert (apart < allowed).all(), (view, row, column)


@torch.inference_mode()
def test_a_tokens_score_is_the_mean_of_its_own_patches() -> None:
    """But for the image's own mean and deviation, which scores are rid of."""
    views, patches = glimpsed(SPEC, (90, 160))
    expected = patches.mean(1) @ torch.tensor([10.0, 1.0])
    found, wanted = ((x - x.mean()) / x.std() for x in (views.scores, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_scores_are_distances_from_the_mean_of_what_the_connector_gets(tiny: LoadedModel) -> None:
    """And not from that of merged tokens."""
    vision: Any = adapter_of(tiny.model, tiny.processor, "mean_distance")._vision
    pixels = torch.randn(2, 3, SPEC.tile, SPEC.tile)
    _, scores = vision.run(pixels)
    x = tiny.model.model.vision_model(pixels).last_hidden_state
    near = nn.functional.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1).view(2, 4, 2, 4, 2)
    torch.testing.assert_close(scores.view(2, 4, 4), -near.mean((2, 4)))


@pytest.mark.parametrize("name", ["mean_query", "received", "distinct"])
@torch.inference_mode()
def test_other_scores_are_means_of_patches_too(tiny: LoadedModel, name: Score) -> None:
    vision: Any = adapter_of(tiny.model, tiny.processor, name)._vision
    pixels, given = torch.randn(2, 3, SPEC.tile, SPEC.tile), []
    score = vision._score
    vision._score = lambda inputs: given.append(score(inputs)) or given[0]
    _, scores = vision.run(pixels)
    blocks = nn.functional.avg_pool2d(given[0].view(2, 8, 8), 2)
    torch.testing.assert_close(scores.view(2, 4, 4), blocks)
    assert scores.std() > 0


def counted(work: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("spec", [SPEC, TinySmolVlmSpec(tile=65, scale=3)])
def test_operations_are_those_that_torch_counts(spec: TinySmolVlmSpec) -> None:
    model, files = untrained_smolvlm(spec)
    model.set_attn_implementation("eager")
    inner = model.eval().model
    tower = adapter_of(model, Processor.from_transformers(files)).family.tower
    pixels = torch.zeros(2, 3, spec.tile, spec.tile)
    assert counted(lambda: inner.vision_model(pixels)) == tower.whole(2)
    assert tower.whole(2) == replace(tower, score_products=0).needed(2)
    assert tower.visual_tokens == spec.tokens
    width = 32 * spec.scale**2
    projection = inner.connector.modality_projection
    assert counted(lambda: projection(torch.zeros(7, width))) == tower.projector(7)
    features = torch.zeros(1, spec.patches**2, 32)
    assert counted(lambda: inner.connector(features)) == tower.projector(tower.visual_tokens)


def test_files_of_2025_are_read(tmp_path: Path) -> None:
    """Also by transformers, so that what they say is what it says."""
    build_idefics3(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["scale_factor"]) == ("idefics3", 3)
    AutoModelForImageTextToText.from_pretrained(tmp_path)
    loaded = loading.load(str(tmp_path), revision=None, dtype="float32", device="cpu")
    assert loaded.adapter.family.geometry((10, 10)).entries[0] == literal(
        loaded.processor.tokenizer.convert_tokens_to_ids(FAKE)
    )

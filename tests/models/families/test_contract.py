"""What every family keeps, held against stock transformers on tiny checkpoints.

A new family gets these tests for a line in `tests/support/families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gc2ray.compression.geometry import LITERAL, NEWLINE, Geometry
from gc2ray.compression.registry import COMPRESSORS, build
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Score
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import ImageRef, Request
from gc2ray.engine.engine import Engine
from gc2ray.models import loading
from gc2ray.models.adapter import SCORE_DEVIATION, LoadedModel, pixel_table
from gc2ray.models.base import Family, Prompt, VisionSide
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.checkpoint.known_models import KNOWN_MODELS
from gc2ray.models.image_processor import Tiles, tile
from gc2ray.models.layers.scores import SCORES, ScoreInputs
from gc2ray.models.layers.tower import in_blocks
from gc2ray.models.llama import unsupported
from gc2ray.models.registry import FAMILIES as MODEL_FAMILIES
from gc2ray.models.registry import chosen_score
from tests.support.families import FAMILIES, Size
from tests.support.rows import encoded, make_recipe

NEW_TOKENS = 16
TOLERANCE = 1e-5
"""Largest difference of logits, float32; those of tiny models are of size 1 to 10."""
NAMES = sorted(FAMILIES)
CASES = [(name, size) for name in NAMES for size in FAMILIES[name].sizes]
PLACED = [method for method in COMPRESSORS if method != "globalcom2-reference"]


@dataclass(frozen=True)
class Tiny:
    """A family's tiny checkpoint, loaded by gc2ray, and stock's processor."""

    loaded: LoadedModel
    stock: Any

    @property
    def family(self) -> Family:
        return self.loaded.adapter.family


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny checkpoints by name, made when they are first asked for."""

    @cache
    def of(name: str) -> Tiny:
        directory = tmp_path_factory.mktemp(name)
        FAMILIES[name].build(directory)
        loaded = loading.load(str(directory), revision=None, dtype="float32", device="cpu")
        return Tiny(loaded, FAMILIES[name].stock(directory))

    return of


def noise(size: Size, seed: int = 0) -> Image.Image:
    """An image of random pixels, so that no view equals another."""
    draw = np.random.default_rng([*size, seed])
    small = draw.integers(0, 256, (max(1, size[0] // 3), max(1, size[1] // 3), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)


def row(*sizes: Size) -> Request:
    """A row with an image of each size."""
    images = tuple(ImageRef(encoded(noise(size, seed))) for seed, size in enumerate(sizes))
    return Request(f"{sizes}", "test", 0, images, ("What is it?",))


def stock_inputs(found: Tiny, *sizes: Size) -> Any:
    text = ChatPrompt(found.loaded.processor).render("What is it?", len(sizes))
    bos = found.loaded.processor.tokenizer.bos_token
    special = not (bos and text.startswith(bos))
    images = [noise(size, seed) for seed, size in enumerate(sizes)]
    return found.stock(
        images=[images] if images else None,
        text=[text],
        add_special_tokens=special,
        return_tensors="pt",
    )


def engine_of(found: Tiny, method: str = "globalcom2", retention: float = 1.0) -> Engine:
    changes: dict[str, Any] = {
        "compression__method": method,
        "compression__retention": retention,
        "generation__max_new_tokens": NEW_TOKENS,
    }
    return Engine(found.loaded, make_recipe("unused", **changes), Cluster(views_per_batch=60))


def answered(engine: Engine, rows: list[Request]) -> dict[str, tuple[int, ...]]:
    """Token ids by row."""
    answers = list(engine.stream(rows))
    assert [answer.error for answer in answers] == [None] * len(rows)
    return {answer.request.row_key: answer.token_ids for answer in answers}


def cut_behind_end(tokens: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def forward(found: Tiny, prompt: Prompt) -> Tensor:
    """The model's logits over one of our prompts, (T, vocabulary)."""
    logits: Tensor = found.loaded.model(inputs_embeds=prompt.embeds[None]).logits[0]
    return logits


def normalised(tiles: Tiles, family: Family) -> Tensor:
    table, places = pixel_table(family.cropping), torch.from_numpy(tiles.pixels).long()
    return torch.stack([table[channel][places[..., channel]] for channel in range(3)], dim=1)


# --- against stock ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "size"), CASES)
def test_views_are_those_of_stocks_processor(tiny: Any, name: str, size: Size) -> None:
    found = tiny(name)
    pixels = stock_inputs(found, size)["pixel_values"]
    ours = normalised(tile(noise(size), found.family.cropping), found.family)
    assert torch.equal(ours, pixels.view(-1, *pixels.shape[-3:]).float()[: len(ours)])


@pytest.mark.parametrize(("name", "size"), CASES)
def test_the_layout_is_what_stock_writes(tiny: Any, name: str, size: Size) -> None:
    """Visual tokens and newlines as the model's own placeholder, literals as themselves."""
    found = tiny(name)
    expected: list[int] = stock_inputs(found, size)["input_ids"][0].tolist()
    config = found.loaded.model.config
    filler = config.image_token_id
    entries = found.family.geometry(size).entries
    written = [LITERAL - int(entry) if entry <= LITERAL else filler for entry in entries]
    ids = ChatPrompt(found.loaded.processor).encode("What is it?")
    mark = ids.index(found.family.image_token_id)
    assert [*ids[:mark], *written, *ids[mark + 1 :]] == expected


def assert_equal_to_stock(found: Tiny, *sizes: Size) -> None:
    """Logits of every prompt token behind the images, and the greedy tokens."""
    inputs, engine = stock_inputs(found, *sizes), engine_of(found)
    theirs = found.loaded.model(**inputs).logits[0]
    (prompt,) = engine.prompts([row(*sizes)])
    assert len(prompt) == len(theirs)
    first = prompt.visual[0][1] - 1 if sizes else 0
    torch.testing.assert_close(
        forward(found, prompt)[first:], theirs[first:], rtol=0, atol=TOLERANCE
    )
    written = found.loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    tokens = written[0, inputs["input_ids"].shape[1] :].tolist()
    ours = answered(engine, [row(*sizes)])
    assert list(ours.values()) == [cut_behind_end(tokens, found.loaded.end_tokens)]


@pytest.mark.parametrize(("name", "size"), CASES)
@torch.inference_mode()
def test_uncompressed_it_equals_stock(tiny: Any, name: str, size: Size) -> None:
    assert_equal_to_stock(tiny(name), size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 2, 3])
@torch.inference_mode()
def test_several_images_and_none_equal_stock(tiny: Any, name: str, count: int) -> None:
    """A row of text alone has another prompt in some chat templates."""
    assert_equal_to_stock(tiny(name), *FAMILIES[name].sizes[:count])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_shared_with_rows_of_several_where_it_is_cut_alike(
    tiny: Any, name: str
) -> None:
    family, sizes = tiny(name).family, FAMILIES[name].sizes
    differs = {
        family.cropping.cut(size) != family.cropping.cut(size, alone=False)
        or family.geometry(size) != family.geometry(size, alone=False)
        for size in sizes
    }
    assert differs == {family.cropping.cuts_several_differently}
    engine = engine_of(tiny(name), "globalcom2", 0.25)
    answers = list(engine.stream([row(sizes[0]), row(*sizes[:2])]))
    wanted = 3 if family.cropping.cuts_several_differently else 2
    assert sum(a.images_encoded for a in answers) == wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["globalcom2", "pool"])
@torch.inference_mode()
def test_compressed_it_equals_generate_over_the_same_embeddings(
    tiny: Any, name: str, method: str
) -> None:
    """In one batch of all sizes, of several images and none; alone the same tokens again."""
    found, sizes = tiny(name), FAMILIES[name].sizes
    rows = [row(), row(*sizes[:2]), row(*sizes[1:4]), *map(row, sizes)]
    engine = engine_of(found, method, 0.25)
    prompts = engine.prompts(rows)
    together = answered(engine, rows)
    for request, prompt in zip(rows, prompts, strict=True):
        output = found.loaded.model.generate(
            inputs_embeds=prompt.embeds[None], do_sample=False, max_new_tokens=NEW_TOKENS
        )
        expected = cut_behind_end(output[0].tolist(), found.loaded.end_tokens)
        assert together[request.row_key] == expected
        engine.clear_cache()
        assert answered(engine, [request]) == {request.row_key: expected}


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_is_the_one_promised(tiny: Any, name: str) -> None:
    assert (unsupported(tiny(name).loaded.model) is None) == FAMILIES[name].native


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_known_models_has_its_score(tiny: Any, name: str) -> None:
    config = tiny(name).loaded.model.config
    kinds = config.model_type, config.vision_config.model_type
    known = {model.score for model in KNOWN_MODELS if (model.model_type, model.tower) == kinds}
    assert known == {chosen_score(tiny(name).family, None)}


@pytest.mark.parametrize("name", NAMES)
def test_metadata_needs_no_weights_and_says_the_same(tiny: Any, name: str) -> None:
    found = tiny(name)
    path = found.loaded.model.config._name_or_path
    metadata = loading.load_metadata(path, dtype="float32")
    adapter = found.loaded.adapter
    assert metadata.shape == adapter.shape
    assert metadata.shape.needs() == adapter.needs()
    for size in FAMILIES[name].sizes:
        assert metadata.family.geometry(size) == found.family.geometry(size)
        assert metadata.family.cropping.cut(size) == found.family.cropping.cut(size)


# --- the tower ----------------------------------------------------------------------------------


def thawed(found: Tiny, score: Score) -> VisionSide:
    """The vision side with layers of torch's, as a GPU runs it."""
    model = found.loaded.model
    return MODEL_FAMILIES[model.config.model_type][1](model, found.family, score)


def pixels_of(found: Tiny) -> Tensor:
    tile = found.family.cropping.tile
    return torch.randn(2, 3, tile, tile, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["class_token", "mean_query", "received"])
@torch.inference_mode()
def test_scores_are_made_in_the_last_layer_from_its_input(
    tiny: Any, name: str, score: Score
) -> None:
    """Of merged patches they are the mean."""
    found, family = tiny(name), tiny(name).family
    if score == "class_token" and not family.tower.class_token:
        with pytest.raises(ConfigError, match="no class token"):
            chosen_score(family, score)
        return
    inner, pixels = found.loaded.model.model, pixels_of(found)
    tower = inner.vision_tower if hasattr(inner, "vision_tower") else inner.vision_model
    layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    state = tower(pixels, output_hidden_states=True).hidden_states[len(layers) - 1]
    inputs = ScoreInputs(layers[-1], state, state, family.tower.class_token)
    merge = round(family.tower.merge**0.5)
    side = round(family.tower.visual_tokens**0.5)
    wanted = in_blocks(SCORES[score](inputs)[..., None], side, merge).mean((2, 3))
    torch.testing.assert_close(thawed(found, score).run(pixels)[1], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_operations_of_the_tower_are_those_that_torch_counts(tiny: Any, name: str) -> None:
    """Layers that run, scores, and the projector where all tokens go through it."""
    found = tiny(name)
    model, tower = found.loaded.model, found.loaded.adapter.shape.tower
    before, vision = (
        model.config._attn_implementation,
        thawed(found, chosen_score(found.family, None)),
    )
    model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            vision.run(pixels_of(found))
    finally:
        model.set_attn_implementation(before)
    behind = tower.projector(2 * tower.visual_tokens) if tower.projects_all else 0
    assert counter.get_total_flops() == tower.needed(2) + behind
    assert tower.score_products > 0


PADDED = [
    ("llava_next_siglip", (60, 90), True),
    ("granite_vision", (60, 90), True),
    ("llava_onevision", (60, 190), False),
]


@pytest.mark.parametrize(("name", "size", "alone"), PADDED)
@torch.inference_mode()
def test_scores_are_standardised_without_padding(
    tiny: Any, name: str, size: Size, *, alone: bool
) -> None:
    adapter = tiny(name).loaded.adapter
    (views,) = adapter.encode([tile(noise(size), adapter.family.cropping, alone=alone)], [0])
    valid = views.index.valid
    assert not valid.all()
    assert float(views.scores[valid].mean()) == pytest.approx(0, abs=1e-4)
    deviation = float(views.scores[valid].std(correction=0))
    assert deviation == pytest.approx(SCORE_DEVIATION, rel=1e-4)


# --- any size, any method -----------------------------------------------------------------------

edges = st.one_of(st.integers(1, 3000), st.integers(1, 120))


def views_of(geometry: Geometry, seed: int) -> Views:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(geometry.tokens, generator=draw)
    return Views(torch.randn(geometry.tokens, 3, generator=draw), scores, geometry, (1, 1), seed)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(size=st.tuples(edges, edges), alone=st.booleans())
def test_a_geometry_is_consistent(tiny: Any, name: str, size: Size, *, alone: bool) -> None:
    family = tiny(name).family
    geometry = family.geometry(size, alone=alone)
    visual = geometry.entries[geometry.entries >= 0]
    assert len(set(visual.tolist())) == len(visual)
    assert geometry.visual_tokens >= sum(geometry.valid_per_view) == int(geometry.valid.sum()) > 0
    assert geometry.thumbnail is None or 0 <= geometry.thumbnail < len(geometry.views)
    assert geometry is family.geometry(size, alone=alone), "made anew for the same size"
    assert (geometry.entries == NEWLINE).any() == (geometry.newlines > 0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(edges, edges),
    retention=st.sampled_from([0.02, 0.1, 0.25, 0.6, 0.95, 1.0]),
    seed=st.integers(0, 99),
    alone=st.booleans(),
)
@example(size=(60, 190), retention=0.25, seed=0, alone=False)
def test_methods_keep_their_promises(
    tiny: Any, name: str, size: Size, retention: float, seed: int, *, alone: bool
) -> None:
    """No padding, no token twice, every view a token, within the bounds, in reading order."""
    views = views_of(tiny(name).family.geometry(size, alone=alone), seed)
    geometry = views.geometry
    for method in PLACED:
        compressor = build(method, retention=retention)
        selection = compressor(views)
        assert selection.places is not None
        assert (selection.places.diff() > 0).all()
        assert torch.equal(selection.entries, views.index.entries[selection.places])
        tokens = selection.entries[selection.entries >= 0]
        whole = retention == 1 or method == "none"  # with the padding that stock reads
        assert whole or views.index.valid[tokens.long()].all(), f"{method} keeps padding"
        kept = selection.kept_per_view(geometry)
        low, high = compressor.bounds(geometry)
        assert low <= sum(kept) <= high, method
        if method != "thumbnail":
            pairs = zip(kept, geometry.valid_per_view, strict=True)
            assert all((count > 0) == (full > 0) for count, full in pairs), method
        if retention == 1 and method != "thumbnail":
            assert len(selection.entries) == len(geometry.entries)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", PLACED)
def test_several_images_equal_one_by_one(tiny: Any, name: str, method: str) -> None:
    family, kinds = tiny(name).family, product(FAMILIES[name].sizes, (True, False))
    geometries = [family.geometry(size, alone=alone) for size, alone in kinds]
    images = [views_of(geometry, seed) for seed, geometry in enumerate(geometries)]
    compressor = build(method, retention=0.3)
    for image, together in zip(images, compressor.many(images), strict=True):
        alone = compressor(image)
        assert torch.equal(alone.entries, together.entries)

"""LLaVA-NeXT against stock transformers: at retention 1.0 nothing may differ."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from gc2ray.compression.selection import OriginalPositions, everything
from gc2ray.core.config.input import ImageLimits
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import ConfigError
from gc2ray.core.records import Request
from gc2ray.engine.engine import Engine, load_engine
from gc2ray.engine.prompt_builder import load_tiles
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.families.tiny import TinySpec, build_tiny
from gc2ray.models.hf_reference import stock_generate, stock_inputs
from gc2ray.models.image_processor import tile
from gc2ray.models.layers.cpu_attention import compiled_kernel
from gc2ray.models.layers.linear import packed_module
from gc2ray.models.layers.tower import _FeedForward, _replacement, _ViewAttention
from gc2ray.models.registry import adapter_of
from tests.support.greedy import plain_greedy
from tests.support.rows import SIZES, make_recipe, request, requests
from tests.support.stock import prompt_logits, stock_logits
from tests.support.tiny_models import SPECS

NEW_TOKENS = 24


def opened(row: Request) -> Image.Image:
    assert row.images[0].data is not None
    return Image.open(io.BytesIO(row.images[0].data))


def rendered(loaded: LoadedModel, row: Request) -> str:
    return ChatPrompt(loaded.processor).render(row.prompts[0])


def make_engine(
    loaded: LoadedModel, retention: float, method: str = "globalcom2", **changes: Any
) -> Engine:
    recipe = make_recipe(
        "unused",
        compression__retention=retention,
        compression__method=method,
        generation__max_new_tokens=NEW_TOKENS,
        **changes,
    )
    return Engine(loaded, recipe, Cluster(views_per_batch=100))


def tokens_of(engine: Engine, rows: list[Request]) -> dict[str, tuple[int, ...]]:
    """Token ids per row."""
    answers = list(engine.stream(rows))
    assert [answer.error for answer in answers] == [None] * len(rows)
    return {answer.request.row_key: answer.token_ids for answer in answers}


def stock_tokens(loaded: LoadedModel, rows: list[Request]) -> dict[str, tuple[int, ...]]:
    """Stock's padded batch of the same rows, each cut behind its end of sequence."""
    images = [opened(row) for row in rows]
    texts = [rendered(loaded, row) for row in rows]
    eos = loaded.model.generation_config.eos_token_id
    outputs = stock_generate(loaded, images, texts, NEW_TOKENS)
    cut = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in outputs]
    return {row.row_key: tuple(tokens) for row, tokens in zip(rows, cut, strict=True)}


def test_a_frozen_family_packs_what_runs_and_leaves_the_model_alone(
    loaded_models: dict[str, LoadedModel],
) -> None:
    loaded = loaded_models["vicuna"]
    tower = loaded.model.model.vision_tower.encoder.layers
    ours = vars(loaded.adapter._vision)["layers"]
    packed = [not any(isinstance(m, torch.nn.Linear) for m in layer.modules()) for layer in ours]
    assert packed == [True] * (len(tower) - 1) + [False], "the last layer does not run"
    assert all(isinstance(layer.mlp.fc1, torch.nn.Linear) for layer in tower)
    assert all(isinstance(layer.mlp, _FeedForward) for layer in ours[:-1])
    assert not any(isinstance(layer.mlp, _FeedForward) for layer in tower)
    thawed = adapter_of(loaded.model, loaded.processor)
    cropping = thawed.family.cropping
    tiles = [load_tiles(row.images[0], cropping, ImageLimits()) for row in requests(SIZES[:2])]
    with torch.inference_mode():
        for a, b in zip(
            thawed.encode(tiles, [0, 0]), loaded.adapter.encode(tiles, [0, 0]), strict=True
        ):
            torch.testing.assert_close(a.features, b.features)
            torch.testing.assert_close(a.scores, b.scores)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("views", [1, 12])
def test_feed_forward_is_transformers(
    capability: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    mlp = CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=96))  # biases, too
    inputs = 3 * torch.randn(views, 17, 24)
    kept = inputs.clone()
    with torch.inference_mode():
        wanted = mlp(inputs)
        torch.testing.assert_close(_FeedForward(mlp)(inputs), wanted, rtol=1e-5, atol=1e-6)
    assert inputs.equal(kept)


@pytest.mark.parametrize("width", [64, 96])
def test_attention_of_views_is_transformers(width: int) -> None:
    """Heads of 16 and of 24 features: the compiled way takes the first only."""
    config = CLIPVisionConfig(hidden_size=width, num_attention_heads=4, attn_implementation="sdpa")
    attention = CLIPAttention(config)
    inputs = 3 * torch.randn(3, 17, width)
    packed = packed_module(attention, _replacement)
    built = compiled_kernel() is not None and width == 64
    assert isinstance(packed, _ViewAttention) == built
    with torch.inference_mode():
        outputs, _ = packed(hidden_states=inputs, attention_mask=None)
        wanted, _ = attention(hidden_states=inputs)
    torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backbone", SPECS)
def test_tokens_equal_stock_at_retention_one(
    loaded_models: dict[str, LoadedModel], backbone: str
) -> None:
    loaded = loaded_models[backbone]
    rows = requests(SIZES)
    ours = tokens_of(make_engine(loaded, 1.0), rows)
    assert ours == stock_tokens(loaded, rows)
    assert len(set(ours.values())) > 1, "all answers alike: this test could not fail"


@pytest.mark.parametrize("decoder", ["native", "generate"])
def test_a_repetition_penalty_is_that_of_stock(
    loaded_models: dict[str, LoadedModel], decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the prompt's tokens, the image's placeholder included, and the answer so far."""
    loaded, penalty = loaded_models["llama3"], 1.4
    plain = make_engine(loaded, 1.0)
    if decoder == "generate":
        monkeypatch.setattr("gc2ray.engine.engine.unsupported", lambda model: "it is new")
    engine = make_engine(loaded, 1.0, generation__repetition_penalty=penalty)
    rows = requests(SIZES)
    ours = tokens_of(engine, rows)
    for row in rows:
        inputs = stock_inputs(loaded, [opened(row)], [rendered(loaded, row)])
        length = inputs["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        output = loaded.model.generate(**inputs, **options, repetition_penalty=penalty)
        assert ours[row.row_key] == tuple(output[0, length:].tolist())
    assert ours != tokens_of(plain, rows), "the penalty changes nothing: this could not fail"


@pytest.mark.parametrize("size", [(10, 2000), (2000, 10)])
def test_extreme_shapes_equal_stock(
    loaded_models: dict[str, LoadedModel], size: tuple[int, int]
) -> None:
    loaded = loaded_models["vicuna"]
    rows = [request(size)]
    assert tokens_of(make_engine(loaded, 1.0), rows) == stock_tokens(loaded, rows)


@pytest.mark.parametrize("backbone", SPECS)
@pytest.mark.parametrize("size", [*SIZES, (10, 2000), (2000, 10)])
def test_logits_equal_stock_at_retention_one(
    loaded_models: dict[str, LoadedModel], backbone: str, size: tuple[int, int]
) -> None:
    loaded = loaded_models[backbone]
    row = request(size, seed=5)
    prompt = make_engine(loaded, 1.0).prompts([row])[0]
    stock = stock_logits(loaded, opened(row), rendered(loaded, row))
    torch.testing.assert_close(prompt_logits(loaded, prompt), stock, rtol=0, atol=1e-5)


def test_negative_control(loaded_models: dict[str, LoadedModel]) -> None:
    """Dropping half of the tokens, or taking another image, does move logits and tokens."""
    loaded = loaded_models["vicuna"]
    row = request((168, 168), seed=5)
    stock = stock_logits(loaded, opened(row), rendered(loaded, row))
    half = prompt_logits(loaded, make_engine(loaded, 0.5).prompts([row])[0])
    assert (half - stock).abs().max() > 1e-3
    other = replace(request((168, 168), seed=6), row_key=row.row_key)
    assert tokens_of(make_engine(loaded, 1.0), [row]) != tokens_of(
        make_engine(loaded, 1.0), [other]
    )


@pytest.mark.parametrize("retention", [0.75, 0.25, 0.1])
@pytest.mark.parametrize("method", ["globalcom2", "globalcom2-reference", "pool"])
def test_batch_equals_one_by_one(
    loaded_models: dict[str, LoadedModel], retention: float, method: str
) -> None:
    loaded = loaded_models["llama3"]
    rows = requests(SIZES)
    engine = make_engine(loaded, retention, method)
    together = tokens_of(engine, rows)
    alone = {key: value for row in rows for key, value in tokens_of(engine, [row]).items()}
    assert together == alone
    assert len(set(together.values())) > 1


def test_views_equal_the_stock_tower(loaded_models: dict[str, LoadedModel]) -> None:
    """Features are hidden_states[-2] bit for bit; packing everything is stock's own."""
    loaded = loaded_models["vicuna"]
    adapter, rows = loaded.adapter, requests(SIZES)
    tiles = [load_tiles(row.images[0], adapter.family.cropping, ImageLimits()) for row in rows]
    with torch.inference_mode():
        views = adapter.encode(tiles, [0] * len(rows))
        packed = adapter.pack(views, [everything(view) for view in views])
        for row, ours in zip(rows, packed, strict=True):
            inputs = stock_inputs(loaded, [opened(row)], ["<image>"])
            stock = loaded.model.model.get_image_features(
                inputs["pixel_values"], inputs["image_sizes"]
            )
            torch.testing.assert_close(ours, stock.pooler_output[0], rtol=0, atol=1e-5)


@pytest.fixture
def module_state(loaded_models: dict[str, LoadedModel]) -> Iterator[None]:
    """What is put on a model is taken off: hooks, attributes, weights and config as before."""

    def snapshot(model):
        return {
            name: (
                type(module),
                sorted(vars(module)),
                len(module._forward_hooks) + len(module._forward_pre_hooks),
                "forward" in vars(module),
            )
            for name, module in model.named_modules()
        }

    model = loaded_models["mistral"].model
    before, config = snapshot(model), model.config.to_json_string()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    assert snapshot(model) == before
    assert model.config.to_json_string() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.usefixtures("module_state")
def test_the_model_is_left_as_it_was(loaded_models: dict[str, LoadedModel]) -> None:
    list(make_engine(loaded_models["mistral"], 0.25).stream(requests(SIZES[:3])))


def test_kv_bytes_follow_the_config(loaded_models: dict[str, LoadedModel]) -> None:
    # keys and values x 2 layers x 2 key-value heads x head size 8 x 4 bytes
    assert loaded_models["llama3"].adapter.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4


def test_placeholders_and_images_must_agree(loaded_models: dict[str, LoadedModel]) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        loaded_models["vicuna"].adapter.embed([5, 6], [torch.zeros(2, 48)])


def test_text_after_an_image_starts_after_the_uncompressed_one(
    loaded_models: dict[str, LoadedModel],
) -> None:
    """Two images between three texts: of 7 places the first keeps two, of 5 the second one."""
    adapter = loaded_models["vicuna"].adapter
    image = loaded_models["vicuna"].model.config.image_token_id
    ids, packed = [5, image, 6, 7, image, 8], [torch.zeros(2, 48), torch.zeros(1, 48)]
    first, second = (
        OriginalPositions(torch.tensor([1, 6]), 7),
        OriginalPositions(torch.tensor([4]), 5),
    )

    def positions(*places: OriginalPositions | None) -> list[int]:
        prompt = adapter.embed(ids, packed, places)
        assert prompt.positions is not None
        assert prompt.positions.dtype == torch.int64
        assert len(prompt.positions) == len(prompt)
        return prompt.positions.tolist()

    assert positions(first, second) == [0, 2, 7, 8, 9, 14, 15]
    assert positions(first, None) == [0, 2, 7, 8, 9, 10, 11]
    assert positions(None, second) == [0, 1, 2, 3, 4, 9, 10]
    assert adapter.embed(ids, packed, [None, None]).positions is None
    assert adapter.embed(ids, packed).positions is None
    with pytest.raises(ValueError, match="zip"):
        adapter.embed(ids, packed, [first])


def test_logits_after_a_gap_are_those_of_the_plain_loop(
    loaded_models: dict[str, LoadedModel],
) -> None:
    loaded = loaded_models["mistral"]
    recipe = make_recipe("unused", compression__positions="original")
    (prompt,) = Engine(loaded, recipe, Cluster()).prompts([request((168, 168))])
    assert prompt.positions is not None
    logits = prompt_logits(loaded, prompt)
    first = plain_greedy(loaded.model, prompt.embeds, prompt.positions, 1)
    assert [int(logits.argmax())] == first
    compact = prompt_logits(loaded, replace(prompt, positions=None))
    assert (logits - compact).abs().max() > 1e-3, "the gaps say nothing"


def test_features_of_other_layers_equal_stock(tmp_path) -> None:
    """The general path: features from two layers, the last one among them."""
    path = build_tiny(tmp_path / "model", TinySpec(vision_layers=(-3, -1)))
    loaded = loading.load(str(path), revision=None, dtype="float32", device="cpu")
    row = request((168, 168))
    prompt = make_engine(loaded, 1.0).prompts([row])[0]
    stock = stock_logits(loaded, opened(row), rendered(loaded, row))
    torch.testing.assert_close(prompt_logits(loaded, prompt), stock, rtol=0, atol=1e-5)


# --- loading -----------------------------------------------------------------------------------


def test_a_missing_model_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"there is no model in .*nowhere"):
        load_engine(make_recipe(tmp_path / "nowhere"), Cluster())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_metadata_needs_no_weights(
    name: str, tiny_paths: dict[str, Path], loaded_models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    """And says what the loaded model says."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_paths[name], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    metadata, adapter = (
        loading.load_metadata(str(bare), dtype="float32"),
        loaded_models[name].adapter,
    )
    family = metadata.family
    assert (metadata.shape, family.cropping) == (adapter.shape, adapter.family.cropping)
    assert metadata.shape.needs() == adapter.needs()
    for size in SIZES:
        tiles = tile(Image.new("RGB", size[::-1]), family.cropping)
        assert len(tiles.pixels) == len(family.geometry(size).views)
        assert family.geometry(size) == adapter.family.geometry(size)
    chat = ChatPrompt(family.processor)
    assert chat.encode("what is it?") == ChatPrompt(loaded_models[name].processor).encode(
        "what is it?"
    )
    with pytest.raises(ConfigError, match="has no weights"):
        loading.load(str(bare), revision=None, dtype="float32", device="cpu")

"""Scores of patches, each against its definition written out."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, InternVLVisionConfig, SiglipVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from gc2ray.core.config.compression import Score
from gc2ray.core.config.generation import TakenOver
from gc2ray.core.errors import ConfigError
from gc2ray.models import loading
from gc2ray.models.adapter import SCORE_DEVIATION, standardised
from gc2ray.models.checkpoint.consistency import check_directory
from gc2ray.models.image_processor import tile
from gc2ray.models.layers.scores import SCORES, ScoreInputs, score_products
from tests.support.families import FAMILIES
from tests.support.rows import picture

VIEWS, PATCHES, WIDTH, HEADS = 3, 37, 32, 4
SIZES = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": HEADS}


def layer_of(tower: str) -> Any:
    """A layer with random weights, biases and norms: fresh ones are zero or one and would hide."""
    if tower == "clip":
        layer: Any = CLIPEncoderLayer(CLIPVisionConfig(**SIZES))
    elif tower == "siglip":
        layer = SiglipEncoderLayer(SiglipVisionConfig(**SIZES))
    else:
        config = InternVLVisionConfig(
            **SIZES, attention_bias=True, use_qk_norm=tower == "internvit-6b", norm_type="rms_norm"
        )
        layer = InternVLVisionLayer(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs_of(tower: str) -> ScoreInputs:
    draw = torch.Generator().manual_seed(1)
    first = int(tower != "siglip")
    state = torch.randn(VIEWS, first + PATCHES, WIDTH, generator=draw)
    features = torch.randn(VIEWS, PATCHES, WIDTH, generator=draw)
    return ScoreInputs(layer_of(tower), state, features, class_token=bool(first))


def heads_of(inputs: ScoreInputs) -> tuple[Tensor, Tensor, float]:
    """Queries and keys by head, (V, heads, tokens, width of a head), and the scale."""
    layer, attention = inputs.layer, inputs.attention
    norm = layer.layer_norm1 if hasattr(layer, "layer_norm1") else layer.layernorm_before
    x = norm(inputs.state)
    parts = []
    for name in ("q", "k"):
        part = getattr(attention, f"{name}_proj")(x)
        part = getattr(attention, f"{name}_norm", torch.nn.Identity())(part)
        parts.append(part.view(VIEWS, -1, HEADS, WIDTH // HEADS).transpose(1, 2))
    return parts[0], parts[1], float(attention.scale)


TOWERS = ("clip", "siglip", "internvit", "internvit-6b")


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    assert found.dtype is torch.float32


@pytest.mark.parametrize("tower", ["clip", "internvit", "internvit-6b"])
@torch.inference_mode()
def test_class_token_is_its_attention_logits_over_heads(tower: str) -> None:
    inputs = inputs_of(tower)
    query, key, scale = heads_of(inputs)
    close(SCORES["class_token"](inputs), (query @ key.transpose(2, 3) * scale).mean(1)[:, 0, 1:])


@pytest.mark.parametrize("tower", TOWERS)
@torch.inference_mode()
def test_mean_query_is_the_mean_logit_of_all_patches(tower: str) -> None:
    inputs = inputs_of(tower)
    first = int(inputs.class_token)
    query, key, scale = heads_of(inputs)
    logits = query[:, :, first:] @ key[:, :, first:].transpose(2, 3) * scale
    close(SCORES["mean_query"](inputs), logits.mean((1, 2)))


@pytest.mark.parametrize("tower", TOWERS)
@torch.inference_mode()
def test_received_is_softmaxed_attention_from_all_patches(tower: str) -> None:
    inputs = inputs_of(tower)
    first = int(inputs.class_token)
    query, key, scale = heads_of(inputs)
    weights = (query[:, :, first:] @ key[:, :, first:].transpose(2, 3) * scale).softmax(-1)
    found = SCORES["received"](inputs)
    close(found, weights.mean((1, 2)))
    close(found.sum(1), torch.ones(VIEWS))


@pytest.mark.parametrize(
    ("score", "tower"), sorted({*product(SCORES, TOWERS)} - {("class_token", "siglip")})
)
@torch.inference_mode()
def test_products_of_scores_are_those_that_torch_counts(score: Score, tower: str) -> None:
    inputs = inputs_of(tower)
    with FlopCounterMode(display=False) as counter:
        SCORES[score](inputs)
    products = score_products(score, PATCHES, WIDTH, norms=tower == "internvit-6b")
    assert counter.get_total_flops() == 2 * VIEWS * products


def test_mean_distance_is_minus_the_cosine_to_the_mean() -> None:
    inputs = inputs_of("siglip")
    found = SCORES["mean_distance"](inputs)
    for view in range(VIEWS):
        x = inputs.features[view]
        for patch in range(PATCHES):
            wanted = -F.cosine_similarity(x[patch], x.mean(0), dim=0)
            close(found[view, patch], wanted)


def test_distinct_is_minus_gaussians_of_the_distance_over_calm_channels() -> None:
    inputs = inputs_of("siglip")
    found = SCORES["distinct"](inputs)
    x = inputs.features[1]
    calm = x[:, x.var(0).argsort()[: WIDTH // 2]]
    unit = calm / calm.norm(dim=1, keepdim=True)
    distance = ((unit - unit.mean(0)) ** 2).sum(1)
    gaussians = sum(torch.exp(-distance / (2 * width)) for width in (0.125, 0.25, 0.5, 1.0, 2.0))
    close(found[1], -torch.as_tensor(gaussians))


@pytest.mark.parametrize("score", ["mean_distance", "distinct"])
def test_a_patch_unlike_the_others_is_kept_first(score: str) -> None:
    """For the scores of features: attention may go anywhere in a random layer."""
    features = torch.ones(1, PATCHES, WIDTH) + 0.01 * torch.randn(1, PATCHES, WIDTH)
    features[0, 5] = -torch.ones(WIDTH) + 0.01 * torch.randn(WIDTH)
    inputs = ScoreInputs(layer_of("siglip"), features, features, class_token=False)
    assert SCORES[score](inputs).argmax() == 5  # type: ignore[index]


def test_a_tower_without_a_class_token_is_not_scored_by_it() -> None:
    with pytest.raises(ValueError, match="no class token"):
        SCORES["class_token"](inputs_of("siglip"))


# --- of an image, and in a recipe ---------------------------------------------------------------


def test_standardised_scores_have_one_mean_and_deviation_over_what_shows_the_image() -> None:
    scores, valid = 3 + 5 * torch.randn(60), torch.arange(60) < 40
    found = standardised(scores, valid)
    torch.testing.assert_close(found[valid].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[valid].std(correction=0), torch.tensor(SCORE_DEVIATION))
    assert torch.equal(found.argsort(), scores.argsort())
    assert standardised(torch.ones(6), torch.ones(6, dtype=torch.bool)).isfinite().all()


def test_the_recipes_score_is_the_one_that_ranks(tmp_path: Path) -> None:
    """Each of them: the family's scores, standardised unless they are the class token's."""
    FAMILIES["llava_next"].build(tmp_path)
    ranked = {}
    for score in (None, *SCORES):
        loaded = loading.load(
            str(tmp_path), revision=None, dtype="float32", device="cpu",
            taken_over=TakenOver(score=score),
        )  # fmt: skip
        tiles = tile(picture((100, 200), 1), loaded.adapter.family.cropping)
        with torch.inference_mode():
            (views,) = loaded.adapter.encode([tiles], [0])
        ranked[score] = views.scores
        if score not in (None, "class_token"):
            assert abs(float(views.scores[views.index.valid].mean())) < 1e-5
    assert torch.equal(ranked[None], ranked["class_token"])
    orders = {tuple(scores.argsort().tolist()) for scores in ranked.values()}
    assert len(orders) == len(SCORES)


def test_class_token_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """By the driver, from the files alone, and wherever the model is loaded."""
    FAMILIES["granite_vision"].build(tmp_path)
    asked = TakenOver(score="class_token")
    with pytest.raises(ConfigError, match=r"^recipe.compression.score: .* has no class"):
        check_directory(tmp_path, asked)
    with pytest.raises(ConfigError, match="class_token"):
        loading.load_metadata(str(tmp_path), dtype="float32", taken_over=asked)
    check_directory(tmp_path, TakenOver(score="received"))

"""The class token's scores, as a share of the time of the vision tower that they come from."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from gc2ray.models.layers.scores import ScoreInputs, class_token
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.inputs import SIDE, TILE
from jobs.benchmarks.support.timing import Work, in_turn

LAYERS, WIDTH, HEADS = 24, 1024, 16
"""Of CLIP ViT-L/14-336."""
LAYERS_RUN = LAYERS - 1
"""The last one is not run: features and scores come from its input."""
LAYERS_TIMED = 2
VIEWS, TURNS, SCORES_PER_TURN = 5, 3, 10
SHARE = 0.01


@torch.inference_mode()
def run() -> list[Line]:
    """Times a few layers and scales them up to the tower: its layers are all alike."""
    tower = _beginning_of_tower()
    *layers, last = tower.encoder.layers
    pixels = torch.randn(VIEWS, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))

    def embed() -> Any:
        return tower.pre_layrnorm(tower.embeddings(pixels))

    state = embed()
    inputs = ScoreInputs(last, state, state[:, 1:], class_token=True)
    works: dict[str, Work] = {
        "embed": embed,
        "layers": lambda: [layer(state, attention_mask=None) for layer in layers],
        "scores": lambda: [class_token(inputs) for _ in range(SCORES_PER_TURN)],
    }
    in_turn(works, turns=1)  # warms up
    times = {name: median(taken.cpu) for name, taken in in_turn(works, TURNS).items()}
    layer_s, scores_s = times["layers"] / LAYERS_TIMED, times["scores"] / SCORES_PER_TURN
    tower_s = times["embed"] + LAYERS_RUN * layer_s
    share = scores_s / (tower_s + scores_s)
    what = (
        f"ViT-L/14-336, {VIEWS} views; tower of {LAYERS_RUN} layers scaled up from {LAYERS_TIMED}"
    )
    figures = {
        "share_percent": share * 100,
        "scores_ms": scores_s * 1e3,
        "layer_ms": layer_s * 1e3,
        "tower_s": tower_s,
    }
    return [Line(what, figures, goal(f"share below {SHARE:.0%}", met=share < SHARE))]


def _beginning_of_tower() -> Any:
    """Random weights; the layers that are timed, and one more that the scores belong to."""
    config: Any = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS_TIMED + 1,
        num_attention_heads=HEADS,
        image_size=TILE,
        patch_size=TILE // SIDE,
    )
    return CLIPVisionModel(config).eval()

"""The tower alone: what is in each patch, and what is in the view.

The patch losses act on the features that the language model gets (layer -2), so that every patch of
a thing says what it is; the view's loss acts on the class token behind the last layer, so that its
attention there, which the compressors rank tokens by, looks for things. The heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gc2ray.demo.scenes import KINDS
from gc2ray.demo.spec import demo_anyres, demo_spec
from jobs.training.labels import NOTHING, PATCH_COLOURS, VIEW_LABELS
from jobs.training.lessons import Lesson

VIEW_WEIGHT = 4.0
PLACE_WEIGHT = 0.1
BACKGROUND_WEIGHT = 0.5


class TowerRun(nn.Module):
    """All layers of a CLIP tower, with what training needs of them."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.mean: Tensor
        self.deviation: Tensor
        anyres = demo_anyres()
        self.register_buffer("mean", 255 * torch.tensor(anyres.mean).view(3, 1, 1))
        self.register_buffer("deviation", 255 * torch.tensor(anyres.std).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (V, T, T, 3) to features (V, N, D) and the class token's output (V, D)."""
        tower = self.tower
        values = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.deviation
        state = tower.pre_layrnorm(tower.embeddings(values))
        for layer in tower.encoder.layers[:-1]:
            state = layer(state, attention_mask=None)
        last = tower.encoder.layers[-1](state, attention_mask=None)
        return state[:, 1:], tower.post_layernorm(last[:, 0])


class TowerHeads(nn.Module):
    """Linear heads over features and class token."""

    def __init__(self) -> None:
        super().__init__()
        spec = demo_spec()
        width, side = spec.vision[0], spec.image_size // spec.patch_size
        self.norm = nn.LayerNorm(width)
        self.sizes = (1 + len(KINDS), 1 + len(PATCH_COLOURS), side, side)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.view = nn.Linear(width, VIEW_LABELS)
        self.side = side

    def forward(self, features: Tensor, class_token: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of kind, colour, row and column of each patch, and of the view's labels."""
        return list(self.patch(self.norm(features)).split(self.sizes, -1)), self.view(class_token)


class TowerLearner:
    """First stage; see `jobs.training.trainer.Learner`."""

    def __init__(self, model: Any) -> None:
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")  # 65 tokens: faster than a fused kernel on CPUs
        self.run = TowerRun(tower).to(model.device)
        self.heads = TowerHeads().to(model.device)
        self._device = model.device

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.run.tower, "heads": self.heads}

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        for module in self.modules().values():
            yield {"params": list(module.parameters()), "lr": rate}

    def loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        features, class_token = self.run(lesson.pixels.to(self._device))
        return self.losses(lesson, features, class_token)

    def losses(
        self, lesson: Lesson, features: Tensor, class_token: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of features and class tokens, and how often they are right."""
        labels = {
            name: lesson.label(name).to(self._device) for name in ("kinds", "colours", "present")
        }
        (kinds, colours, rows, columns), view = self.heads(features, class_token)
        shown = labels["kinds"] != NOTHING
        places = torch.arange(self.heads.side**2, device=self._device).expand(len(features), -1)
        loss = (
            _patch_loss(kinds, labels["kinds"], shown)
            + _patch_loss(colours, labels["colours"], shown)
            + PLACE_WEIGHT * _entropy(rows, places // self.heads.side).mean()
            + PLACE_WEIGHT * _entropy(columns, places % self.heads.side).mean()
            + VIEW_WEIGHT * F.binary_cross_entropy_with_logits(view, labels["present"])
        )
        right = (kinds.argmax(-1) == labels["kinds"]) & (colours.argmax(-1) == labels["colours"])
        exact = ((view > 0) == (labels["present"] > 0)).all(-1)
        return loss, {
            "patches": right[shown].float().mean(),
            "background": right[~shown].float().mean(),
            "views": exact.float().mean(),
        }


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


def _patch_loss(logits: Tensor, labels: Tensor, shown: Tensor) -> Tensor:
    """Patches of things and of background weigh what they weigh, however many there are."""
    entropy = _entropy(logits, labels)
    return entropy[shown].mean() + BACKGROUND_WEIGHT * entropy[~shown].mean()

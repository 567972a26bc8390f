"""The tower alone: what is in each patch, and what is in the view.

The patch losses act on the features that the language model gets, so that every patch of a thing
says what it is; the view's loss acts on what stands for the view: the class token behind the last
layer, so that its attention there, which the compressors rank tokens by, looks for things; or the
patches' mean where there is no class token. The heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gc2ray.demo.scenes import KINDS
from jobs.training.labels import NOTHING, PATCH_COLOURS, VIEW_LABELS
from jobs.training.lessons import Lesson
from jobs.training.pocket import Pocket

VIEW_WEIGHT = 4.0
PLACE_WEIGHT = 0.1
BACKGROUND_WEIGHT = 0.5


class TowerHeads(nn.Module):
    """Linear heads over features, `width` wide, of `side` x `side` patches, and over views."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = (1 + len(KINDS), 1 + len(PATCH_COLOURS), side, side)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.view = nn.Linear(width, VIEW_LABELS)
        self.side = side

    def forward(self, features: Tensor, views: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of kind, colour, row and column of each patch, and of the view's labels."""
        return list(self.patch(self.norm(features)).split(self.sizes, -1)), self.view(views)


class TowerLearner:
    """First stage; see `jobs.training.trainer.Learner`."""

    def __init__(self, model: Any, pocket: Pocket) -> None:
        self.pocket = pocket
        self.run = pocket.tower(model).to(model.device)
        width, cutter = model.config.vision_config.hidden_size, pocket.cutter
        self.heads = TowerHeads(width, cutter.tile // cutter.patch).to(model.device)
        self._device = model.device

    def modules(self) -> dict[str, nn.Module]:
        return {"tower": self.run.tower, "heads": self.heads}

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        for module in self.modules().values():
            yield {"params": list(module.parameters()), "lr": rate}

    def loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        features, views = self.run(lesson.pixels.to(self._device))
        return self.losses(lesson, features, views)

    def losses(
        self, lesson: Lesson, features: Tensor, views: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of features and of what stands for views, and how often they are right."""
        labels = {
            name: lesson.label(name).to(self._device) for name in ("kinds", "colours", "present")
        }
        (kinds, colours, rows, columns), view = self.heads(features, views)
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

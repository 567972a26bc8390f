"""Scores: how important each patch of a view is, from the tower that encoded it.

* `class_token`: the class token's attention logits in the last layer, averaged over heads
  (GlobalCom², arXiv 2501.05179). `mean_h(scale q_h k_h) = scale/H q k` over the full width, and k
  is linear in the layer's input, so the row folds to one product per token, `(W_k^T q) x + q b_k`:
  no keys, no heads, float32.
* `mean_distance`: -cos(x_i, mean of x) over a view's features, those that the projector gets. The
  paper's own for towers without a class token (its Table 5, which does not name the layer of x).
* `mean_query`: as `class_token` with the mean of all patches' queries in its place; it folds alike.
* `received`: softmaxed attention that a patch receives in the last layer, averaged over heads and
  queries. Takes the layer's queries and keys and N² products a view: about 1 % of the operations
  of a SigLIP-400M tower.
* `distinct`: how far a patch lies from its view's mean, as VidCom² measures it (arXiv 2505.14454):
  minus a sum of Gaussians of the distance, over the half of the channels that vary least.

All are float32 (V, N), higher for patches to be kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gc2ray.core.config.compression import Score
from gc2ray.models.layers.tower import has_norms

WIDTHS = tuple(2.0**power for power in range(-3, 2))
"""Widths of `distinct`'s Gaussians, as VidCom² has them."""


@dataclass(frozen=True, eq=False)
class ScoreInputs:
    """What scores are made from.

    Attributes:
        layer: The tower's last layer; it is not run.
        state: The layer's input, (V, [1 +] N, D), a class token first where there is one.
        features: The patches' features, (V, N, D).
        class_token: Whether there is a class token.
    """

    layer: Any
    state: Tensor
    features: Tensor
    class_token: bool

    @property
    def attention(self) -> Any:
        """The layer's attention."""
        return self.layer.self_attn if hasattr(self.layer, "self_attn") else self.layer.attention

    def normed(self) -> Tensor:
        """The attention's input, float32 (V, [1 +] N, D)."""
        clip = hasattr(self.layer, "layer_norm1")
        norm = self.layer.layer_norm1 if clip else self.layer.layernorm_before
        if not isinstance(norm, nn.LayerNorm):
            return norm(self.state).float()  # type: ignore[no-any-return]
        size, bias = self.state.shape[-1:], norm.bias
        return F.layer_norm(self.state.float(), size, norm.weight.float(), bias.float(), norm.eps)


def class_token(inputs: ScoreInputs) -> Tensor:
    """See the module.

    Raises:
        ValueError: The tower has no class token.
    """
    if not inputs.class_token:
        raise ValueError("the vision tower has no class token")
    x = inputs.normed()
    return _logits(inputs.attention, _queries(inputs.attention, x[:, 0]), x[:, 1:])


def mean_query(inputs: ScoreInputs) -> Tensor:
    """See the module."""
    x = inputs.normed()[:, int(inputs.class_token) :]
    return _logits(inputs.attention, _queries(inputs.attention, x).mean(1), x)


def received(inputs: ScoreInputs) -> Tensor:
    """See the module."""
    attention, x = inputs.attention, inputs.normed()[:, int(inputs.class_token) :]
    views, patches, _ = x.shape
    heads = int(attention.num_heads)
    queries, keys = (
        part.view(views, patches, heads, -1).transpose(1, 2)
        for part in (_queries(attention, x), _keys(attention, x))
    )
    found = x.new_zeros(views, patches)
    # Head by head: all at once a view of 729 patches would take 100 MB.
    for query, key in zip(queries.unbind(1), keys.unbind(1), strict=True):
        found += (query @ key.mT * float(attention.scale)).softmax(-1).mean(1)
    return found / heads


def mean_distance(inputs: ScoreInputs) -> Tensor:
    """See the module."""
    x = inputs.features.float()
    return -F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1)


def distinct(inputs: ScoreInputs) -> Tensor:
    """See the module."""
    x = inputs.features.float()
    width = x.shape[-1]
    calm = x.var(dim=1).argsort(dim=-1)[:, None, : max(1, width // 2)].expand(-1, x.shape[1], -1)
    unit = F.normalize(x.gather(-1, calm), dim=-1)
    distance = (unit - unit.mean(dim=1, keepdim=True)).pow(2).sum(-1)
    return -torch.stack([torch.exp(-distance / (2 * width)) for width in WIDTHS]).sum(0)


SCORES: dict[Score, Callable[[ScoreInputs], Tensor]] = {
    "class_token": class_token,
    "mean_distance": mean_distance,
    "mean_query": mean_query,
    "received": received,
    "distinct": distinct,
}
"""By the name in a recipe."""


def score_products(score: Score, patches: int, width: int, *, norms: bool) -> int:
    """Multiplications in the matrix products of a view's scores.

    Args:
        score: The score's name.
        patches: Patches of a view.
        width: Width of the tower's hidden states.
        norms: Whether attention has norms of its own, behind which nothing folds.
    """
    projection = width**2
    keys = patches * projection if norms else projection  # folded: those of a single query
    logits = patches * width
    match score:
        case "class_token":
            return projection + keys + logits
        case "mean_query":
            return patches * projection + keys + logits
        case "received":
            return 2 * patches * projection + patches * logits
    return 0


def _logits(attention: Any, query: Tensor, x: Tensor) -> Tensor:
    """Mean over heads of scale * q k(x_i), for one query a view, (V, D) and (V, N, D) to (V, N)."""
    scale = float(attention.scale / attention.num_heads)
    if has_norms(attention):  # a norm over all heads stands between: nothing folds
        return torch.einsum("vnd,vd->vn", _keys(attention, x), query) * scale
    folded = query @ attention.k_proj.weight.float()  # (V, D)
    logits: Tensor = torch.einsum("vnd,vd->vn", x, folded)
    if attention.k_proj.bias is not None:  # equal within a view, not between views
        logits = logits + (query @ attention.k_proj.bias.float())[:, None]
    return logits * scale


def _queries(attention: Any, x: Tensor) -> Tensor:
    return _projected(attention.q_proj, getattr(attention, "q_norm", None), x)


def _keys(attention: Any, x: Tensor) -> Tensor:
    return _projected(attention.k_proj, getattr(attention, "k_norm", None), x)


def _projected(layer: Any, norm: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    out = F.linear(x, layer.weight.float(), bias)
    return out if norm is None else norm(out).float()

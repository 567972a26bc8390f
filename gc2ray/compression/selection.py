"""`Selection`: which tokens of the views are kept, in reading order, and their old positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gc2ray.compression.canvas import NEWLINE
from gc2ray.compression.canvas_index import canvas_index
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class Selection:
    """The tokens of an image that the language model reads, in order.

    Attributes:
        token_index: int32 (K,); view * N + token, or `NEWLINE`.
        features: For methods that merge tokens: float (K, D), the merged tokens (rows at newlines
            are not read), and `token_index` names a token that each stands for.
    """

    token_index: Tensor
    features: Tensor | None = None

    def kept_per_view(self, views: int, tokens_per_view: int) -> tuple[int, ...]:
        """Kept tokens of each view. Brings `token_index` to the host."""
        index = self.token_index.cpu()
        kept = index[index >= 0] // tokens_per_view
        return tuple(torch.bincount(kept, minlength=views).tolist())

    def bitmaps(self, views: int, tokens_per_view: int) -> tuple[bytes, ...]:
        """Which tokens of each view are kept; bit i, counted from the lowest, is token i."""
        kept = torch.zeros(views * tokens_per_view, dtype=torch.bool)
        index = self.token_index.cpu().long()
        kept[index[index >= 0]] = True
        rows = kept.view(views, tokens_per_view).numpy()
        return tuple(row.tobytes() for row in np.packbits(rows, axis=1, bitorder="little"))


@dataclass(frozen=True)
class OriginalPositions:
    """Positions that the selected tokens would have if nothing were dropped.

    Attributes:
        index: Position of each token and newline in the uncompressed image's sequence, int64 (K,).
        length: Tokens and newlines of that sequence.
    """

    index: Tensor
    length: int


def reading_order(views: Sequence[Views], keep: Tensor) -> list[Selection]:
    """Selections from a mask: kept tokens in reading order, one newline per row that keeps one.

    Args:
        views: Images of one model.
        keep: bool (sum of V, N), the images' views one after the other.
    """
    return _emit(views, keep, only_kept_rows=True)


def everything(views: Views) -> Selection:
    """The uncompressed image, as stock transformers packs it: bare newlines included."""
    return _emit([views], views.valid, only_kept_rows=False)[0]


def _emit(views: Sequence[Views], keep: Tensor, *, only_kept_rows: bool) -> list[Selection]:
    """One gather for all images; `keep` is bool (sum of V, N)."""
    indexes = [canvas_index(view.canvas, view.thumbnail, view.scores.device) for view in views]
    sizes = [len(index.order) for index in indexes]
    tokens = [index.valid.numel() for index in indexes]
    rows = [view.canvas.grid[0] * view.canvas.side[0] + 1 for view in views]
    table = torch.tensor([_starts(tokens), _starts(rows)]).to(keep.device)  # (2, B)
    owner = torch.arange(len(views), device=keep.device).repeat_interleave(
        torch.tensor(sizes, device=keep.device), output_size=sum(sizes)
    )
    order = torch.cat([index.order for index in indexes])
    is_newline = order == NEWLINE
    tokens_at = (order + table[0][owner]).masked_fill_(is_newline, 0)
    emitted = keep.flatten()[tokens_at] & ~is_newline
    if only_kept_rows:
        row_of = torch.cat([index.row_of for index in indexes]) + table[1][owner]
        kept_rows = torch.zeros(sum(rows), dtype=torch.bool, device=keep.device)
        kept_rows[row_of[emitted]] = True
        newlines = kept_rows[row_of]
    else:
        newlines = torch.cat([index.image_rows for index in indexes])
    emitted |= is_newline & newlines
    if len(views) == 1:
        return [Selection(order[emitted])]
    counts = torch.bincount(owner[emitted], minlength=len(views)).tolist()
    return [Selection(chosen) for chosen in torch.split(order[emitted], counts)]


def _starts(lengths: Sequence[int]) -> list[int]:
    starts = [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    return starts


def top_k_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts[v]` best of each row; ties go to the lower index. (V, N), (V,) -> (V, N).

    Tokens that must never be kept have a score of minus infinity and are not counted in `counts`.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(scores.shape[1], device=scores.device).expand_as(order))
    return ranks < counts[:, None]


def share_of(valid: Tensor, retention: float | Tensor) -> Tensor:
    """Tokens that a view keeps: int(valid * retention), at least one if it has any. (V,) int64."""
    exact = valid.double() * retention
    return torch.minimum(exact.floor().long().clamp_min(1), valid)

"""`Selection`: which entries of an image's layout are kept, in reading order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gc2ray.compression.geometry import LITERAL, NEWLINE, Geometry
from gc2ray.compression.views import Views


@dataclass(frozen=True)
class Selection:
    """What the language model reads of an image, in order.

    Attributes:
        entries: int32 (K,); token numbers, `NEWLINE`, or `literal(token id)`.
        places: int64 (K,), where each entry stands in the layout, ascending; None for methods that
            write entries elsewhere than stock does.
        features: For methods that merge tokens: float (N, D), which replace those of the views. A
            merged token stands for one of its tokens.
    """

    entries: Tensor
    places: Tensor | None = None
    features: Tensor | None = None

    def kept_per_view(self, geometry: Geometry) -> tuple[int, ...]:
        """Kept tokens of each view. Brings `entries` to the host."""
        kept = self.entries.cpu().numpy()
        views = np.searchsorted(geometry.starts, kept[kept >= 0], side="right") - 1
        return tuple(np.bincount(views, minlength=len(geometry.views)).tolist())

    def bitmaps(self, geometry: Geometry) -> tuple[bytes, ...]:
        """Which tokens of each view are kept; bit i, counted from the lowest, is token i."""
        kept = np.zeros(geometry.tokens, dtype=bool)
        entries = self.entries.cpu().numpy()
        kept[entries[entries >= 0]] = True
        return tuple(
            np.packbits(view, bitorder="little").tobytes()
            for view in np.split(kept, geometry.starts[1:])
        )


@dataclass(frozen=True)
class OriginalPositions:
    """Positions that the selected entries would have if nothing were dropped.

    Attributes:
        index: Position of each entry in the uncompressed image's sequence, int64 (K,).
        length: Entries of that sequence.
    """

    index: Tensor
    length: int


def reading_order(views: Sequence[Views], keep: Tensor) -> list[Selection]:
    """Selections from a mask: kept tokens where they stood, one newline per line that keeps one.

    Literals stay. One gather serves all images.

    Args:
        views: The images.
        keep: Which tokens are kept, bool (sum of N,).
    """
    indexes = [view.index for view in views]
    sizes = [len(index.entries) for index in indexes]
    tokens = [view.geometry.tokens for view in views]
    lines = [index.lines for index in indexes]
    table = torch.tensor([_starts(tokens), _starts(lines)]).to(keep.device)  # (2, B)
    owner = torch.arange(len(views), device=keep.device).repeat_interleave(
        torch.tensor(sizes, device=keep.device), output_size=sum(sizes)
    )
    entries = torch.cat([index.entries for index in indexes])
    is_visual, is_newline = entries >= 0, entries == NEWLINE
    tokens_at = (entries + table[0][owner]).masked_fill_(~is_visual, 0)
    kept = keep[tokens_at] & is_visual
    line_of = torch.cat([index.line_of for index in indexes]) + table[1][owner]
    kept_lines = torch.zeros(sum(lines), dtype=torch.bool, device=keep.device)
    kept_lines[line_of[kept]] = True
    kept |= (is_newline & kept_lines[line_of]) | (entries <= LITERAL)
    at = kept.nonzero().squeeze(1)
    if len(views) == 1:
        return [Selection(entries[at], at)]
    counts = torch.bincount(owner[at], minlength=len(views)).tolist()
    places = at - torch.tensor(_starts(sizes), device=keep.device)[owner[at]]
    pairs = zip(torch.split(entries[at], counts), torch.split(places, counts), strict=True)
    return [Selection(*pair) for pair in pairs]


def everything(views: Views) -> Selection:
    """The image as stock transformers packs it: bare newlines included."""
    entries = views.index.entries
    return Selection(entries, torch.arange(len(entries), device=entries.device))


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

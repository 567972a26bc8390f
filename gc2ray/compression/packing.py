"""`Packing`: the newlines, literals and positions of a selection in the language model's input.

The default is the paper's, and needs no work: entries are numbered 0..K-1 as they are read, the
newlines are those of lines that keep a token, and literals stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gc2ray.compression.geometry import LITERAL, NEWLINE
from gc2ray.compression.selection import OriginalPositions, Selection
from gc2ray.compression.views import Views
from gc2ray.core.config.compression import Markers, Newlines, Positions


@dataclass(frozen=True)
class Packing:
    """Settings of packing.

    Attributes:
        positions: `compact` numbers entries 0..K-1 as they are read. `original` gives each entry
            the position that it would have if nothing were dropped, bare newlines included.
        newlines: `kept_rows` keeps the newlines that the method emits. `all` keeps every learned
            newline of the uncompressed image, `none` keeps none.
        markers: `all` keeps the literal tokens around views, `kept_views` those of views that keep
            a token.
    """

    positions: Positions = "compact"
    newlines: Newlines = "kept_rows"
    markers: Markers = "all"

    def apply(self, views: Sequence[Views], selections: Sequence[Selection]) -> list[Selection]:
        """The selections with the newlines and literals of this packing, in the same order.

        Raises:
            ValueError: The method writes entries elsewhere than stock does, and this packing is not
                the default.
        """
        if self.newlines == "kept_rows" and self.markers == "all":
            return list(selections)
        return [self._packed(*pair) for pair in zip(views, selections, strict=True)]

    def original_positions(
        self, views: Sequence[Views], selections: Sequence[Selection]
    ) -> list[OriginalPositions | None]:
        """Positions of what `apply` returned, one per image; None where they are compact.

        Raises:
            ValueError: As `apply`.
        """
        if self.positions == "compact":
            return [None] * len(selections)
        return [
            OriginalPositions(_places(selection), len(view.index.entries))
            for view, selection in zip(views, selections, strict=True)
        ]

    def _packed(self, views: Views, selection: Selection) -> Selection:
        entries = views.index.entries
        kept = torch.zeros(len(entries), dtype=torch.bool, device=entries.device)
        kept[_places(selection)] = True
        if self.newlines != "kept_rows":
            kept = torch.where(entries == NEWLINE, self.newlines == "all", kept)
        if self.markers == "kept_views":
            kept &= (entries > LITERAL) | _stands_for_kept(views, selection)
        places = kept.nonzero().squeeze(1)
        return Selection(entries[places], places, selection.features)


def _places(selection: Selection) -> Tensor:
    if selection.places is None:
        raise ValueError("a method that packs images itself takes no other packing")
    return selection.places


def _stands_for_kept(views: Views, selection: Selection) -> Tensor:
    """Of each entry of the layout, whether any view that it stands for keeps a token, bool (E,)."""
    counts = torch.tensor(selection.kept_per_view(views.geometry))
    before = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(views.index.spans.device)
    first, stop = views.index.spans.unbind(1)
    return before[stop] > before[first]

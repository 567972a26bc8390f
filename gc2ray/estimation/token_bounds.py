"""`TokenBounds`: how many tokens compression leaves of an image, by its geometry alone.

They hold whatever an image shows and its scores are (`Compressor.bounds`); newlines lie within
bounds that follow from those. `RowBounds` has them for the images of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gc2ray.compression.base import Compressor
from gc2ray.compression.geometry import Geometry
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.compression.row_budget import WholeShare, share_bounds
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.intervals import Interval


@dataclass(frozen=True)
class TokenBounds:
    """Tokens of an image after compression.

    Attributes:
        visual: Visual tokens.
        newlines: Newline tokens.
        markers: Literal tokens around views, which count as text.
    """

    visual: Interval
    newlines: Interval
    markers: Interval

    @staticmethod
    def from_geometry(
        geometry: Geometry, compression: CompressionConfig, compressor: Compressor
    ) -> TokenBounds:
        """Bounds that follow from an image's geometry alone.

        Args:
            geometry: Views and layout of the image.
            compression: How images are compressed.
            compressor: The same, built.
        """
        low, high = compressor.bounds(geometry)
        visual = Interval(low, (low + high) / 2, high)
        whole = compression.keeps_everything and not isinstance(compressor, WholeShare)
        newlines = _newline_bounds(geometry, compression, visual, whole=whole)
        fewest = geometry.literals if compression.markers == "all" or whole else 0
        markers = Interval(fewest, geometry.literals, geometry.literals)
        return TokenBounds(visual, newlines, markers)


def _newline_bounds(
    geometry: Geometry, compression: CompressionConfig, visual: Interval, *, whole: bool
) -> Interval:
    """Learned newlines that stay; `whole`: the image is left as it is, bare newlines included."""
    if compression.method == "globalcom2-reference" and geometry.canvas is not None:
        return Interval.exactly(geometry.canvas.grid[0] * geometry.canvas.side[0])
    if compression.newlines == "none" or not geometry.newlines:
        return Interval.exactly(0)
    if compression.newlines == "all" or whole:
        return Interval.exactly(geometry.newlines)
    lines, thumbnail, share = geometry.newlines, 0, compression.retention_requested
    if geometry.thumbnail is not None:
        thumbnail = geometry.valid_per_view[geometry.thumbnail]
    outside = max(1.0, thumbnail * share) if thumbnail else 0.0  # in no line; one at least stays
    low, mid, _ = [max(0.0, end - outside) for end in visual.ends]
    longest = max((geometry.visual_tokens - thumbnail) / lines, 1)
    fewest = math.ceil(low / longest)
    # Tokens that fall on rows at random leave each row empty with (1 - 1/rows)^tokens.
    filled = lines * (1 - (1 - 1 / lines) ** mid)
    return Interval(min(fewest, filled), filled, lines)


class RowBounds:
    """Bounds of the images of rows, remembered by their geometries.

    Args:
        compression: How images are compressed.
    """

    def __init__(self, compression: CompressionConfig) -> None:
        self._compression = compression
        self._policy = CompressionPolicy.from_config(compression)
        self._rows: dict[tuple[Geometry, ...], list[TokenBounds]] = {}

    def of(self, row: Sequence[Geometry]) -> list[TokenBounds]:
        """Bounds of each image of a row.

        Where the images share a budget only the sums of the bounds hold: what one image gets above
        its own share, the others lack.
        """
        key = tuple(row)
        if len(key) > 1 and not self._policy.shares_budget:
            return [bounds for image in key for bounds in self.of([image])]
        if key not in self._rows:
            shares = len(key) > 1
            self._rows[key] = self._sharing(key) if shares else [self._one(each) for each in key]
        return self._rows[key]

    def _one(self, geometry: Geometry) -> TokenBounds:
        return TokenBounds.from_geometry(geometry, self._compression, self._policy.compressor)

    def _sharing(self, row: tuple[Geometry, ...]) -> list[TokenBounds]:
        counts = [sum(geometry.valid_per_view) for geometry in row]
        bounds = share_bounds(counts, self._compression.retention)
        images = [
            _SharedImage.at_shares(
                geometry, (self._compression.retention, *of_image), self._at_share
            )
            for geometry, of_image in zip(row, bounds, strict=True)
        ]
        low, high = [image.low for image in images], [image.high for image in images]
        if self._policy.compressor.keeps_its_share:
            low = max([image.least for image in images], low, key=sum)
            high = min([image.most for image in images], high, key=sum)
        return [
            TokenBounds(
                Interval(low[at], image.visual, high[at]),
                _hull([case.newlines for case in image.cases]),
                _hull([case.markers for case in image.cases]),
            )
            for at, image in enumerate(images)
        ]

    def _at_share(self, geometry: Geometry, share: float) -> TokenBounds:
        compression = self._compression.model_copy(update={"retention": share})
        return TokenBounds.from_geometry(geometry, compression, self._policy.at_share(share))


@dataclass(frozen=True)
class _SharedImage:
    """Visual tokens of an image whose row shares a budget.

    The budget is the sum of all shares, so that a row's tokens differ from it only by what images
    keep above or below their shares. Between the shares that are looked at, rounding adds a token a
    view at most.

    Attributes:
        cases: Bounds at the retention, at its least share, and at its highest one.
        least: Its part of the least that the row keeps: of the budget, less what rounding takes.
        visual: The best guess.
        most: Its part of the most.
    """

    cases: tuple[TokenBounds, ...]
    least: float
    visual: float
    most: float

    @staticmethod
    def at_shares(
        geometry: Geometry,
        shares: Sequence[float],
        bounds: Callable[[Geometry, float], TokenBounds],
    ) -> _SharedImage:
        """The image at some shares, the row's retention first."""
        cases = tuple(bounds(geometry, share) for share in shares)
        views = sum(tokens > 0 for tokens in geometry.valid_per_view)
        tokens = sum(geometry.valid_per_view)
        below, above = (
            [
                getattr(case.visual, end) - share * tokens
                for case, share in zip(cases, shares, strict=True)
            ]
            for end in ("low", "high")
        )
        own = shares[0] * tokens
        return _SharedImage(
            cases, own + min(below) - views, cases[0].visual.mid, own + max(above) + views
        )

    @property
    def low(self) -> float:
        """The least that the image keeps at any share."""
        return min(case.visual.low for case in self.cases)

    @property
    def high(self) -> float:
        """The most."""
        return max(case.visual.high for case in self.cases)


def _hull(cases: Sequence[Interval]) -> Interval:
    """Bounds that hold in all cases; the best guess is the first's."""
    return Interval(min(case.low for case in cases), cases[0].mid, max(case.high for case in cases))

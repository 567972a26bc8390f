"""A slow, independent oracle for GlobalCom2, the baselines and packing: loops over Python lists.

Written from the description of the method alone; it shares no code with the package and needs
only the standard library. Conventions: ``size`` is (height, width) of the original image,
``grid`` is (rows, columns) of crops, ``scores[view]`` has side * side floats in raster order,
view 0 is the thumbnail and view 1 + row * columns + column is the crop at (row, column).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

NEWLINE = -1
Scores = Sequence[Sequence[float]]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """What a method keeps.

    Attributes:
        packed: view * side * side + token in emitted order, -1 for a newline.
        kept_per_view: token indices in the padded raster of every view.
        scales: the retention of every crop.
        gap: how far the nearest decision (a score against the cut, a count against an integer)
            is from going the other way; inf where there was nothing to decide.
    """

    packed: list[int]
    kept_per_view: list[set[int]]
    scales: list[float]
    gap: float


# Geometry


def valid_rectangle(size: Pair, grid: Pair, side: int) -> tuple[range, range]:
    """Rows and columns of the canvas (in tokens) that show the image, the rest being padding."""
    height, width = size
    canvas_h, canvas_w = grid[0] * side, grid[1] * side
    if width / height > canvas_w / canvas_h:
        new_h = int(round(height * (canvas_w / width), 7))
        pad = (canvas_h - new_h) // 2
        return range(pad, canvas_h - pad), range(canvas_w)
    new_w = int(round(width * (canvas_h / height), 7))
    pad = (canvas_w - new_w) // 2
    return range(canvas_h), range(pad, canvas_w - pad)


def canvas_to_token(row: int, column: int, grid: Pair, side: int) -> tuple[int, int]:
    """The (view, index in the view's raster) of a canvas position."""
    view = 1 + (row // side) * grid[1] + column // side
    return view, (row % side) * side + column % side


def valid_tokens(size: Pair, grid: Pair, side: int) -> list[list[int]]:
    """The valid token indices of every view, ascending; all of them for the thumbnail."""
    rows, columns = valid_rectangle(size, grid, side)
    views: list[list[int]] = [list(range(side * side))]
    for _ in range(grid[0] * grid[1]):
        views.append([])
    for row in rows:
        for column in columns:
            view, token = canvas_to_token(row, column, grid, side)
            views[view].append(token)
    return views


def pack(kept_per_view: Sequence[set[int]], grid: Pair, side: int) -> list[int]:
    """Thumbnail in raster order, then the canvas row by row, a newline after non-empty rows."""
    packed = sorted(kept_per_view[0])
    for row in range(grid[0] * side):
        line = []
        for column in range(grid[1] * side):
            view, token = canvas_to_token(row, column, grid, side)
            if token in kept_per_view[view]:
                line.append(view * side * side + token)
        if line:
            packed += [*line, NEWLINE]
    return packed


# Packing


def uncompressed_places(
    size: Pair, grid: Pair, side: int, *, thumbnail: bool = True
) -> tuple[dict[int, int], list[int], int]:
    """Places in the uncompressed sequence: of tokens, of every canvas row's newline; its length.

    A row of padding has no newline there: it gets the place of what stands before it, at least 0.
    Without a thumbnail the first crop is view 0.
    """
    rows, columns = valid_rectangle(size, grid, side)
    tokens: dict[int, int] = {}
    newlines: list[int] = []
    first_crop = 0
    if thumbnail:
        first_crop = 1
        for token in range(side * side):
            tokens[token] = token
    place = len(tokens)
    for row in range(grid[0] * side):
        if row in rows:
            for column in columns:
                view, token = canvas_to_token(row, column, grid, side)
                tokens[(view - 1 + first_crop) * side * side + token] = place
                place += 1
            place += 1
        newlines.append(max(place - 1, 0))
    return tokens, newlines, place


def row_of(source: int, grid: Pair, side: int) -> int:
    """The canvas row of a crop's token; view 0 is the thumbnail."""
    view, token = divmod(source, side * side)
    return (view - 1) // grid[1] * side + token // side


def rows_closed(packed: Sequence[int], grid: Pair, side: int) -> list[int]:
    """The canvas row of every newline where rows without tokens have none: of the token before."""
    rows = []
    for i, source in enumerate(packed):
        if source == NEWLINE:
            rows.append(row_of(packed[i - 1], grid, side))
    return rows


def places(
    packed: Sequence[int], closed: Sequence[int], size: Pair, grid: Pair, side: int
) -> list[int]:
    """The place of every emitted token; `closed` names the row of each newline, in order."""
    tokens, newlines, _ = uncompressed_places(size, grid, side)
    found = []
    remaining = list(closed)
    for source in packed:
        if source == NEWLINE:
            found.append(newlines[remaining.pop(0)])
        else:
            found.append(tokens[source])
    assert not remaining
    return found


def pack_with_all_newlines(
    kept_per_view: Sequence[set[int]], size: Pair, grid: Pair, side: int
) -> list[int]:
    """As `pack`, but a newline after every row that shows the image, and no other."""
    rows, _ = valid_rectangle(size, grid, side)
    packed = sorted(kept_per_view[0])
    for row in range(grid[0] * side):
        for column in range(grid[1] * side):
            view, token = canvas_to_token(row, column, grid, side)
            if token in kept_per_view[view]:
                packed.append(view * side * side + token)
        if row in rows:
            packed.append(NEWLINE)
    return packed


def without_padding_newlines(packed: Sequence[int], size: Pair, grid: Pair, side: int) -> list[int]:
    """Of a sequence with a newline for every row of the canvas: only those of the image's rows."""
    rows, _ = valid_rectangle(size, grid, side)
    row = 0
    out = []
    for source in packed:
        if source != NEWLINE:
            out.append(source)
            continue
        if row in rows:
            out.append(source)
        row += 1
    return out


# Choosing tokens


def top(tokens: Sequence[int], values: Sequence[float], count: int) -> tuple[set[int], float]:
    """The count tokens of highest value (ties to the lower index) and the gap at the cut."""
    order = sorted(range(len(tokens)), key=lambda i: (-values[i], tokens[i]))
    gap = math.inf
    if 0 < count < len(order):
        gap = values[order[count - 1]] - values[order[count]]
    return {tokens[i] for i in order[:count]}, gap


def unit(values: Sequence[float]) -> list[float]:
    """Values divided by their L2 norm."""
    norm = max(math.sqrt(math.fsum(value * value for value in values)), 1e-12)
    return [value / norm for value in values]


def region_sums(thumbnail: Sequence[float], grid: Pair, side: int) -> list[float]:
    """The sum of the thumbnail's scores in the region of every crop."""
    region_h, region_w = max(1, side // grid[0]), max(1, side // grid[1])
    sums = [0.0] * (grid[0] * grid[1])
    for i in range(side):
        for j in range(side):
            row = min(i // region_h, grid[0] - 1)
            column = min(j // region_w, grid[1] - 1)
            sums[row * grid[1] + column] += thumbnail[i * side + j]
    return sums


def unclipped_scales(sums: Sequence[float], retention: float, temperature: float) -> list[float]:
    """The retention of every crop before it is clipped at 1."""
    largest = max(sums)
    exps = [math.exp((value - largest) / temperature) for value in sums]
    total = sum(exps) + 1e-8
    sigmas = [value / total for value in exps]
    mean = sum(sigmas) / len(sigmas)
    return [retention * (1 + sigma - mean) for sigma in sigmas]


def source_position(i: int, n: int, side: int) -> tuple[int, int, float]:
    """Lower neighbour, upper neighbour and weight of the upper one, for output pixel i of n."""
    position = max(0.0, (i + 0.5) * side / n - 0.5)
    lower = min(int(position), side - 1)
    return lower, min(lower + 1, side - 1), position - lower


def global_score(thumbnail: Sequence[float], y: Pair, x: Pair, side: int) -> float:
    """The thumbnail's score map read bilinearly; y and x are (output pixel, output length)."""
    top_row, bottom_row, down = source_position(*y, side)
    left, right, across = source_position(*x, side)
    upper = thumbnail[top_row * side + left] * (1 - across)
    upper += thumbnail[top_row * side + right] * across
    lower = thumbnail[bottom_row * side + left] * (1 - across)
    lower += thumbnail[bottom_row * side + right] * across
    return upper * (1 - down) + lower * down


def global_scores(
    thumbnail: Sequence[float], size: Pair, grid: Pair, side: int
) -> list[dict[int, float]]:
    """The global score of every valid token, by view (nothing for the thumbnail) and token."""
    rows, columns = valid_rectangle(size, grid, side)
    views: list[dict[int, float]] = [{} for _ in range(1 + grid[0] * grid[1])]
    for row in rows:
        for column in columns:
            view, token = canvas_to_token(row, column, grid, side)
            y = (row - rows.start, len(rows))
            x = (column - columns.start, len(columns))
            views[view][token] = global_score(thumbnail, y, x, side)
    return views


def count_margin(product: float, valid: int) -> float:
    """Distance of (valid tokens * unclipped scale) from where its integer part would change."""
    if product >= valid:  # clipped: only falling below the number of valid tokens matters
        return product - valid
    return abs(product - round(product))


# The methods


def everything(size: Pair, grid: Pair, side: int) -> Kept:
    """Retention 1.0: a newline after every valid row, even one without valid columns."""
    rows, columns = valid_rectangle(size, grid, side)
    packed = list(range(side * side))
    for row in rows:
        for column in columns:
            view, token = canvas_to_token(row, column, grid, side)
            packed.append(view * side * side + token)
        packed.append(NEWLINE)
    kept = [set(tokens) for tokens in valid_tokens(size, grid, side)]
    return Kept(packed, kept, [1.0] * (grid[0] * grid[1]), math.inf)


def globalcom2(
    scores: Scores,
    size: Pair,
    grid: Pair,
    side: int,
    retention: float,
    temperature: float = 10.0,
) -> Kept:
    """The method of the paper."""
    if retention >= 1.0:
        return everything(size, grid, side)
    thumbnail = scores[0]
    count = max(1, int(side * side * retention))
    kept_thumbnail, gap = top(range(side * side), thumbnail, count)
    kept = [kept_thumbnail]
    valid = valid_tokens(size, grid, side)
    from_global = global_scores(thumbnail, size, grid, side)
    unclipped = unclipped_scales(region_sums(thumbnail, grid, side), retention, temperature)
    scales = [min(1.0, scale) for scale in unclipped]
    for view in range(1, len(valid)):
        tokens = valid[view]
        if not tokens:
            kept.append(set())
            continue
        count = max(1, int(len(tokens) * scales[view - 1]))
        local_part = unit([scores[view][token] for token in tokens])
        global_part = unit([from_global[view][token] for token in tokens])
        combined = [a + b for a, b in zip(local_part, global_part, strict=True)]
        chosen, cut_gap = top(tokens, combined, count)
        kept.append(chosen)
        gap = min(gap, cut_gap, count_margin(len(tokens) * unclipped[view - 1], len(tokens)))
    return Kept(pack(kept, grid, side), kept, scales, gap)


def local(scores: Scores, size: Pair, grid: Pair, side: int, retention: float) -> Kept:
    """Baseline: every view keeps its own highest scores, all at the same retention."""
    if retention >= 1.0:
        return everything(size, grid, side)
    kept = []
    gap = math.inf
    for view, tokens in enumerate(valid_tokens(size, grid, side)):
        count = max(1, int(len(tokens) * retention))
        chosen, cut_gap = top(tokens, [scores[view][token] for token in tokens], count)
        kept.append(chosen)
        gap = min(gap, cut_gap)
    return Kept(pack(kept, grid, side), kept, [retention] * (len(kept) - 1), gap)


def uniform(size: Pair, grid: Pair, side: int, retention: float) -> Kept:
    """Baseline: evenly spaced valid tokens of every view, whatever their scores."""
    if retention >= 1.0:
        return everything(size, grid, side)
    kept = []
    for tokens in valid_tokens(size, grid, side):
        chosen = set()
        for i, token in enumerate(tokens):
            if math.floor((i + 1) * retention) > math.floor(i * retention):
                chosen.add(token)
        kept.append(chosen or set(tokens[:1]))
    return Kept(pack(kept, grid, side), kept, [retention] * (len(kept) - 1), math.inf)

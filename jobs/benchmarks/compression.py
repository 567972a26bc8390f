"""GlobalCom² and the gather of what it keeps, against the same written as a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.compression.canvas import Canvas
from gc2ray.compression.geometry import NEWLINE, canvas_geometry
from gc2ray.compression.methods.globalcom2 import GlobalCom2
from gc2ray.compression.selection import Selection
from gc2ray.compression.views import Views
from jobs.benchmarks import Line, goal
from jobs.benchmarks.support.inputs import SIDE, tiny_model
from jobs.benchmarks.support.timing import Work, in_turn, median_ratio

METHOD, SPEED_UP, WIDTH, TOKENS = GlobalCom2(0.25), 50, 4096, SIDE * SIDE
SIZES = ((768, 1024), (1024, 768), (427, 640), (1411, 1411), (336, 1000), (1000, 336), (872, 1000))
GROUPS = ((1, 9, 10), (64, 5, 1))  # images, turns, calls in a turn
POOL_VIEWS = 40  # features are windows of one tensor, which bounds the memory


def run() -> list[Line]:
    """One image, and a batch of mixed sizes."""
    pool = torch.randn(POOL_VIEWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    lines = []
    for count, turns, calls in GROUPS:
        images = [_views(pool, SIZES[i % len(SIZES)], i) for i in range(count)]
        figures = _compare(images, turns, calls)
        what = f"{count} image(s), {sum(len(view.geometry.views) for view in images)} views"
        met = goal(f"speed-up at least {SPEED_UP}", met=figures["speed_up"] >= SPEED_UP)
        lines.append(Line(what, figures, met))
    return lines


def _views(pool: Tensor, size: tuple[int, int], seed: int) -> Views:
    grid = tiny_model().adapter.family.cropping.cut(size).grid
    geometry = canvas_geometry(Canvas.from_image_size(size, grid, (SIDE, SIDE)))
    count = len(geometry.views)
    first = seed * 5 % (len(pool) - count + 1)
    scores = torch.randn(count * TOKENS, generator=torch.Generator().manual_seed(seed))
    return Views(pool[first : first + count].flatten(0, 1), scores, geometry, size)


def _compare(images: Sequence[Views], turns: int, calls: int) -> dict[str, float]:
    same = sum(map(_same, images, METHOD.many(images)))
    if same < 0.95 * len(images):  # a tie at the last bit may go either way
        raise RuntimeError(f"the loop keeps the same tokens on {same} of {len(images)} images")
    works: dict[str, Work] = {
        "ours": lambda: [len(kept) for kept in map(_gathered, images, METHOD.many(images))],
        "loop": lambda: [len(_loop(view)[0]) for view in images],
        "select": lambda: METHOD.many(images),
    }
    times = in_turn(works, turns, calls)
    speed_up = median_ratio(times["loop"].cpu, times["ours"].cpu)
    medians = {f"{name}_ms": median(taken.cpu) * 1e3 for name, taken in times.items()}
    return {"speed_up": speed_up, **medians, "same_kept_sets": same}


def _gathered(views: Views, selection: Selection) -> Tensor:
    """Kept features, gathered as `gc2ray.models.adapter` does."""
    return views.features.index_select(0, selection.entries.clamp_min(0))


def _same(views: Views, selection: Selection) -> bool:
    (source, features), tokens = _loop(views), selection.entries != NEWLINE
    same = selection.entries.tolist() == source
    return same and torch.equal(_gathered(views, selection)[tokens], features[tokens])


def _loop(views: Views) -> tuple[list[int], Tensor]:
    """As one would write it down, token by token: `Selection.entries`, and features (K, D)."""
    canvas = _canvas(views)
    scores, features = views.scores.view(-1, TOKENS), views.features.view(-1, TOKENS, WIDTH)
    places = torch.full((canvas.grid[0] * SIDE, canvas.grid[1] * SIDE), NEWLINE)
    kept = torch.zeros(*places.shape, WIDTH)
    size, (top, left) = (canvas.height, canvas.width), (canvas.rows[0], canvas.columns[0])
    guidance = F.interpolate(scores[0].view(1, 1, SIDE, SIDE), size, mode="bilinear")[0, 0]
    crops = zip(_loop_shares(views), _loop_tokens(canvas), strict=True)
    for view, (share, tokens) in enumerate(crops, start=1):
        own = torch.tensor([scores[view, token] for _, _, token in tokens])
        guiding = torch.tensor([guidance[row - top, column - left] for row, column, _ in tokens])
        ranks = F.normalize(own, dim=0) + F.normalize(guiding, dim=0)
        for best in _best(ranks.tolist(), share):
            row, column, token = tokens[best]
            places[row, column] = view * TOKENS + token
            kept[row, column] = features[view, token]
    source = sorted(_best([scores[0, token].item() for token in range(TOKENS)], METHOD.retention))
    parts = [features[0, token] for token in source]
    for row in range(len(places)):
        columns = [at for at in range(places.shape[1]) if places[row, at].item() != NEWLINE]
        if columns:
            source += [*(int(places[row, column].item()) for column in columns), NEWLINE]
            parts += [*(kept[row, column] for column in columns), torch.zeros(WIDTH)]
    return source, torch.stack(parts)


def _loop_shares(views: Views) -> list[float]:
    """Retention of each crop; the grids divide `SIDE`."""
    rows, columns = _canvas(views).grid
    sums = [0.0] * (rows * columns)
    for token in range(TOKENS):
        row, column = token // SIDE // (SIDE // rows), token % SIDE // (SIDE // columns)
        sums[row * columns + column] += views.scores[token].item()
    shares = torch.softmax(torch.tensor(sums, dtype=torch.float64) / METHOD.temperature, dim=0)
    return [min(1.0, METHOD.retention * (1 + x.item())) for x in shares - shares.mean()]


def _canvas(views: Views) -> Canvas:
    canvas = views.geometry.canvas
    if canvas is None:
        raise ValueError("the loop is written for LLaVA-NeXT's canvases")
    return canvas


def _loop_tokens(canvas: Canvas) -> list[list[tuple[int, int, int]]]:
    """Per crop its tokens that show the image: row and column on the canvas, index in the crop."""
    crops: list[list[tuple[int, int, int]]] = [[] for _ in range(canvas.crops)]
    for row, column in product(range(*canvas.rows), range(*canvas.columns)):
        crop = row // SIDE * canvas.grid[1] + column // SIDE
        crops[crop].append((row, column, row % SIDE * SIDE + column % SIDE))
    return crops


def _best(ranks: Sequence[float], share: float) -> list[int]:
    count = min(max(1, int(len(ranks) * share)), len(ranks))
    return sorted(range(len(ranks)), key=lambda place: -ranks[place])[:count]

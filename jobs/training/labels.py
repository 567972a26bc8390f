"""What is to be seen in each patch and in each view of a scene."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gc2ray.demo.scenes import COLOURS, KINDS, Scene, digit_boxes
from jobs.training.pocket import Cutter

NOTHING = 0
"""Label of a patch that shows background; kinds and colours count from 1."""
SIGN_PLACES = ("first", "second")
PATCH_COLOURS = (*COLOURS, *(f"sign-{place}" for place in SIGN_PLACES))
"""Colours, and for a sign's digits which of the two they are."""
VIEW_LABELS = len(KINDS) + len(PATCH_COLOURS)
COVERED = 0.35
"""Share of a patch, or of a thing smaller than it, that the thing must cover to be its label."""
SHOWN = 0.5
"""Share of a thing that must lie in a view to be in the view's labels."""


@dataclass(frozen=True)
class ViewLabels:
    """Labels of an image's views.

    Attributes:
        kinds: int64 (V, N), what a patch shows: `NOTHING` or 1 + index into `KINDS`.
        colours: int64 (V, N), likewise for `PATCH_COLOURS`.
        present: float32 (V, K), which kinds and colours a view shows.
    """

    kinds: np.ndarray
    colours: np.ndarray
    present: np.ndarray


def view_labels(scene: Scene, cutter: Cutter) -> ViewLabels:
    """Labels of an image's views, in the cutter's order."""
    named = [
        (KINDS.index(thing.kind), PATCH_COLOURS.index(thing.colour), thing.box)
        for thing in scene.things
    ]
    if scene.sign is not None:
        for place, digit, box in zip(
            SIGN_PLACES, scene.sign.text, digit_boxes(scene.sign), strict=True
        ):
            named.append((KINDS.index(digit), PATCH_COLOURS.index(f"sign-{place}"), box))
    patch = cutter.patch
    edges = np.arange(0, cutter.tile, patch, dtype=float)
    kinds, colours, present = [], [], []
    for boxes in cutter.boxes_in_views(scene, [box for _, _, box in named]):
        across = _overlap(boxes[:, 0], boxes[:, 2], edges, patch)
        down = _overlap(boxes[:, 1], boxes[:, 3], edges, patch)
        cover = down[:, :, None] * across[:, None, :]  # (K, h, w)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        share = cover.reshape(len(named), -1) / np.minimum(areas, patch * patch)[:, None]
        best, enough = share.argmax(axis=0), share.max(axis=0) >= COVERED
        kinds.append(np.where(enough, 1 + np.array([kind for kind, _, _ in named])[best], NOTHING))
        colours.append(np.where(enough, 1 + np.array([c for _, c, _ in named])[best], NOTHING))
        view = np.zeros(VIEW_LABELS, dtype=np.float32)
        for (kind, colour, _), seen in zip(named, cover.sum(axis=(1, 2)) / areas, strict=True):
            if seen >= SHOWN:
                view[kind] = view[len(KINDS) + colour] = 1.0
        present.append(view)
    return ViewLabels(np.stack(kinds), np.stack(colours), np.stack(present))


def _overlap(low: np.ndarray, high: np.ndarray, edges: np.ndarray, patch: int) -> np.ndarray:
    """Length that each interval shares with each patch, (K, patches)."""
    first = np.maximum(low[:, None], edges[None, :])
    last = np.minimum(high[:, None], edges[None, :] + patch)
    shared: np.ndarray = np.clip(last - first, 0, None)
    return shared


def kind_shares(labels: np.ndarray) -> np.ndarray:
    """Labels of kinds as float32 (V, N, kinds): 1 for what is shown."""
    shares: np.ndarray = np.eye(1 + len(KINDS), dtype=np.float32)[labels][..., 1:]
    return shares


def colour_shares(labels: np.ndarray) -> np.ndarray:
    """Labels of colours as float32 (V, N, colours); a sign's digits have none."""
    shares: np.ndarray = np.eye(1 + len(PATCH_COLOURS), dtype=np.float32)[labels]
    return shares[..., 1 : 1 + len(COLOURS)]

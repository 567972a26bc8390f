"""What is asked about a scene, and the right answers.

Seven topics: `which` (which digit, letter or shape has a colour), `colour`, `where` (a quarter of
the image), `count`, `sign` (its two digits), `yesno`, and `caption` (all there is, in the order of
`KINDS`). Answers are short and unique, so that exact match means something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gc2ray.demo.scenes import COLOURS, DIGITS, KINDS, LETTERS, Scene, Thing

CAPTION = "Describe the image in one sentence."
COUNT = "How many coloured objects are there?"
YESNO_SEED = 1
"""Tells these draws from those of the picture, which start from the scene's seed alone."""
SIGN = "What does the sign say?"


@dataclass(frozen=True)
class Question:
    """A question with its answer; `topic` is a key of `TOPICS`."""

    topic: str
    text: str
    answer: str


def which(scene: Scene) -> list[Question]:
    """One question for each thing: which digit, letter or shape has its colour?"""
    return [
        Question("which", f"Which {family(thing.kind)} is {thing.colour}?", thing.kind)
        for thing in scene.things
    ]


def colour(scene: Scene) -> list[Question]:
    """One for each thing: what colour has it?"""
    return [
        Question("colour", f"What colour is the {thing.kind}?", thing.colour)
        for thing in scene.things
    ]


def where(scene: Scene) -> list[Question]:
    """One for each thing: in which quarter does it lie?"""
    return [
        Question("where", f"Where is the {thing.colour} {thing.kind}?", quarter(scene, thing))
        for thing in scene.things
    ]


def count(scene: Scene) -> list[Question]:
    """How many things? A sign does not count."""
    return [Question("count", COUNT, str(len(scene.things)))]


def sign(scene: Scene) -> list[Question]:
    """What does the sign say, where there is one."""
    return [] if scene.sign is None else [Question("sign", SIGN, scene.sign.text)]


def yesno(scene: Scene) -> list[Question]:
    """One to be answered yes and one no, the latter with a right kind or a right colour."""
    rng = np.random.default_rng([scene.seed, YESNO_SEED])
    present = scene.things[int(rng.integers(len(scene.things)))]
    kind, name = present.kind, present.colour
    if rng.random() < 0.5:
        name = str(rng.choice([key for key in COLOURS if key != present.colour]))
    else:
        kind = str(rng.choice([key for key in KINDS if key != present.kind]))
    questions = [Question("yesno", f"Is there a {present.colour} {present.kind}?", "yes")]
    if not any(thing.kind == kind and thing.colour == name for thing in scene.things):
        questions.append(Question("yesno", f"Is there a {name} {kind}?", "no"))
    return questions


def caption(scene: Scene) -> list[Question]:
    """Everything there is."""
    ordered = sorted(scene.things, key=lambda thing: KINDS.index(thing.kind))
    parts = [f"a {thing.colour} {thing.kind}" for thing in ordered]
    if scene.sign is not None:
        parts.append(f"a sign with {scene.sign.text}")
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return [Question("caption", CAPTION, text)]


TOPICS: dict[str, Callable[[Scene], list[Question]]] = {
    "which": which, "colour": colour, "where": where, "count": count, "sign": sign,
    "yesno": yesno, "caption": caption,
}  # fmt: skip


def family(kind: str) -> str:
    """What a kind is one of."""
    if kind in DIGITS:
        return "digit"
    return "letter" if kind in LETTERS else "shape"


def quarter(scene: Scene, thing: Thing) -> str:
    """The quarter of the image that a thing's centre lies in."""
    x, y = thing.centre
    rows, columns = ("top", "bottom"), ("left", "right")
    return f"{rows[y > scene.size[0] / 2]} {columns[x > scene.size[1] / 2]}"

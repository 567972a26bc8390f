"""What the figures of a model say, in words: computed, so that no sentence outlives its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.quality_curve.models import DemoModel

Item = Mapping[str, Any]


def in_points(item: Item) -> str:
    """A difference in points, bold where its interval excludes 0."""
    low, high = 100 * item["low"], 100 * item["high"]
    text = f"{100 * item['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if sign(item) else text


def sign(item: Item) -> int:
    """1 or -1 where the interval of a difference lies above or below 0, else 0."""
    return int(item["low"] > 0) - int(item["high"] < 0)


def tokens(item: Item) -> str:
    """Tokens of a row; of few, with a decimal."""
    return f"{item['tokens']:.{1 if item['tokens'] < 20 else 0}f}"


def _pays(differences: Sequence[Item]) -> str:
    signs = {sign(item) for item in differences}
    if {1, -1} <= signs:
        return "helps at one retention and costs accuracy at another"
    if 1 in signs:
        return "pays" if signs == {1} else "pays at one retention of two"
    return f"does not pay: {'it costs accuracy' if -1 in signs else 'no gain was found'}"


def guidance(differences: Sequence[Item], points: Sequence[Item]) -> str:
    """Whether the thumbnail's guidance pays: `globalcom2` against `local`, which is without it."""
    found = [item for item in differences if item["name"] == "`globalcom2` - `local`"]
    read = {(point["method"], point["retention"]): tokens(point) for point in points}
    figures = ", ".join(
        f"{in_points(item)} at {r:g} ({read['globalcom2', r]} and {read['local', r]} tokens)"
        for item in found
        for r in [item["retention"]]
    )
    return (
        f"**On this model the thumbnail's guidance {_pays(found)}.** `globalcom2` - `local`, the "
        f"same method without it, in points: {figures}."
    )


def default_score(model: DemoModel, scores: Sequence[Item]) -> str:
    """Which score is to be the default, by the rule that the text states, and whether it is."""
    papers, others = model.scores[0], model.scores[1:]
    compared = [item for item in scores if item["method"] == "globalcom2"]
    signs = {
        score: [sign(item["difference"]) for item in compared if item["score"] == score]
        for score in others
    }
    better = [score for score in others if all(found == 1 for found in signs[score])]
    in_part = [score for score in others if 1 in signs[score] and score not in better]
    worse = [score for score in others if -1 in signs[score]]
    retentions = " and ".join(f"{r:g}" for r in dict.fromkeys(i["retention"] for i in compared))
    named = [("Better at one of them only", in_part), ("Worse", worse)]
    if papers == "class_token":
        rule = (
            "*With a class token its score is the default, whatever is better here*: the method "
            f"is published with it. Compared by `globalcom2` at {retentions}."
        )
        named = [("**Better beyond doubt**", better), *named]
        return " ".join([rule, *_remarks(named)])
    rule = (
        f"The rule: *`{papers}`, the paper's, is the default without a class token, unless "
        f"another is better beyond doubt*, by `globalcom2` at {retentions}."
    )
    best = max(better, key=lambda score: _gain(compared, score), default=papers)
    found = f"`{best}` is, and" if better else f"None is: `{papers}`"
    default = "is" if best == model.default_score else "should be"
    return " ".join([rule, f"**{found} {default} the default.**", *_remarks(named)])


def _remarks(named: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return [
        f"{text}: {', '.join(f'`{score}`' for score in scores)}."
        for text, scores in named
        if scores
    ]


def shared_budget(lines: Sequence[Item]) -> str:
    """Whether one budget for the images of a row pays, against one for each."""
    read = {(line["retention"], line["budget"]): tokens(line) for line in lines}
    found = {line["retention"]: line["difference"] for line in lines if "difference" in line}
    figures = ", ".join(
        f"{in_points(item)} at {r:g} ({read[r, 'row']} and {read[r, 'image']} tokens)"
        for r, item in found.items()
    )
    return (
        f"**One budget for two images {_pays([*found.values()])}.** {lines[0]['rows']:,} of the "
        "rows got a second image, on which the right answer does not depend. `budget: row` - "
        f"`budget: image`, in points: {figures}."
    )


def _gain(compared: Sequence[Item], score: str) -> float:
    return sum(float(i["difference"]["mean"]) for i in compared if i["score"] == score)

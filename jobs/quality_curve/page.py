"""The measured curves as Markdown for `docs/quality.md`.

Everything is rendered from one JSON document (`docs/quality.json`), so that a test can tell whether
the page still says what was measured. A model or a part that was not measured yet is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.quality_curve import verdicts
from jobs.quality_curve.models import MODELS, DemoModel
from jobs.quality_curve.plot import COLOURS
from jobs.quality_curve.verdicts import in_points, tokens

Item = Mapping[str, Any]

BEGIN, END = "<!-- quality: made by `make quality` -->", "<!-- end of quality -->"


def render(documents: Mapping[str, Item]) -> str:
    """Everything between the page's marks, from the documents of the models by name."""
    parts = [BEGIN]
    for name, model in MODELS.items():
        parts += _section(model, documents[name]) if name in documents else _unmeasured(model)
    return "\n\n".join([*parts, END])


def inserted(text: str, documents: Mapping[str, Item]) -> str:
    """The page with the rendered documents in place of what is between its marks.

    Raises:
        ValueError: It has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/quality.md lacks the lines {BEGIN} and {END}")
    return before + render(documents) + after


def _unmeasured(model: DemoModel) -> Iterator[str]:
    yield f"### {model.title}"
    yield f"{model.about} Not measured yet (`python -m jobs.quality --model {model.name}`)."


def _section(model: DemoModel, document: Item) -> Iterator[str]:
    """A model's part of the page."""
    yield f"### {model.title}"
    yield _heading(model, document)
    yield f"![Exact match against visual tokens a row]({model.plot})"
    yield _curve(document["points"])
    yield verdicts.guidance(document["differences"], document["points"])
    yield _differences(document["differences"])
    if "downsampled" in document:
        yield model.smaller
        yield _downsampled(document["downsampled"])
    if "scores" in document:
        yield verdicts.default_score(model, document["scores"])
        yield _scores(document["scores"])
    yield _topics(document["topics"])
    if "packings" in document:
        yield packings(document["packings"])
    if "several" in document:
        yield verdicts.shared_budget(document["several"])
        yield _several(document["several"])
    if "markers" in document:
        yield _markers(document["markers"])
    yield _temperatures(model, document)


def _heading(model: DemoModel, document: Item) -> str:
    directory = "/".join(model.directory.parts[-3:])
    return (
        f"`{directory}`. {model.about} `make quality` on {document['hardware']}, "
        f"{document['date']}: {document['rows']:,} held-out rows, float32, greedy. "
        "Exact match with 95% bootstrap intervals; below it the visual tokens a row that the "
        "language model really reads, newlines included."
    )


def _curve(points: Sequence[Item]) -> str:
    swept = [point for point in points if point["method"] in COLOURS]
    retentions = sorted({p["retention"] for p in swept}, reverse=True)
    by = {(p["method"], p["retention"]): p for p in swept}
    rows = []
    for method in COLOURS:
        cells = []
        for retention in retentions:
            point = by.get((method, retention))
            cells.append(f"{_interval(point)}<br>{tokens(point)}" if point else "")
        if any(cells):
            rows.append([f"`{method}`", *cells])
    return _table(["method", *(f"{r:g}" for r in retentions)], rows)


def _differences(differences: Sequence[Item]) -> str:
    rows, retentions = [], list(dict.fromkeys(item["retention"] for item in differences))
    for name in dict.fromkeys(item["name"] for item in differences):
        cells = {item["retention"]: item for item in differences if item["name"] == name}
        rows.append([name, *(in_points(cells[r]) if r in cells else "" for r in retentions)])
    header = ["paired difference, points of exact match", *(f"at {r:g}" for r in retentions)]
    return _table(header, rows)


def _downsampled(lines: Sequence[Item]) -> str:
    header = [
        "`downsample`", "rows that fit", "exact match", "tokens", "prompt", "`globalcom2`",
        "exact match", "tokens", "prompt", "`globalcom2` - `downsample`",
    ]  # fmt: skip
    rows = []
    for line in lines:
        cells = [f"at {line['retention']:g}", f"{line['fitting']:.0%}", *_read(line)]
        ours = line["globalcom2"]
        cells += [f"at {ours['retention']:g}", *_read(ours)]
        rows.append([*cells, in_points(line["difference"])])
    return (
        f"{_table(header, rows)}\n\nCompared is the highest retention of `globalcom2` whose "
        "prompts are no longer, or the lowest."
    )


def _read(line: Item) -> tuple[str, str, str]:
    """Accuracy, visual tokens, and all tokens of the prompt."""
    return _interval(line), tokens(line), f"{line['prompt_tokens']:.0f}"


def _scores(lines: Sequence[Item]) -> str:
    by = {(line["score"], line["retention"], line["method"]): line for line in lines}
    rows = []
    for score, retention in dict.fromkeys((line["score"], line["retention"]) for line in lines):
        ours, local = (by[score, retention, method] for method in ("globalcom2", "local"))
        cells = [f"`{score}`", f"{retention:g}"]
        for line in (ours, local):
            cells += [
                _interval(line),
                in_points(line["difference"]) if "difference" in line else "",
            ]
        rows.append([*cells, in_points(ours["guidance"])])
    header = ["score", "at", "`globalcom2`", "difference", "`local`", "difference"]
    return _table([*header, "`globalcom2` - `local`"], rows)


def _topics(topics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(topics.values())))
    rows = [
        [label, *(f"{by_topic[name]:.3f}" for name in names)] for label, by_topic in topics.items()
    ]
    return _table(["exact match by topic", *names], rows)


def packings(measured: Sequence[Item]) -> str:
    """Policies of packing; differences are to the first of each retention, the paper's way."""
    header = [
        "`globalcom2`", "positions", "newlines", "exact match", "tokens", "difference", "`where`",
        "difference",
    ]  # fmt: skip
    rows = []
    for item in measured:
        differences = [
            in_points(item[name]) if name in item else ""
            for name in ("difference", "where_difference")
        ]
        rows.append([
            f"at {item['retention']:g}", item["positions"], item["newlines"], _interval(item),
            tokens(item), differences[0], f"{item['where']:.3f}", differences[1],
        ])  # fmt: skip
    return _table(header, rows)


def _several(lines: Sequence[Item]) -> str:
    rows = [
        [
            "uncompressed" if line["retention"] == 1 else f"`globalcom2` at {line['retention']:g}",
            "" if line["retention"] == 1 else line["budget"],
            *_read(line),
            in_points(line["difference"]) if "difference" in line else "",
        ]
        for line in lines
    ]
    header = ["two images", "budget", "exact match", "tokens", "prompt"]
    return _table([*header, "difference"], rows)


def _markers(lines: Sequence[Item]) -> str:
    rows = [
        [
            line["markers"],
            *_read(line),
            in_points(line["difference"]) if "difference" in line else "",
        ]
        for line in lines
    ]
    table = _table(["`thumbnail`, markers", "exact match", "tokens", "prompt", "difference"], rows)
    return (
        f"{table}\n\nOnly `thumbnail` leaves views without a token. All other methods keep at "
        "least one of each view, so all markers stay with `markers: kept_views`, too."
    )


def _temperatures(model: DemoModel, document: Item) -> str:
    default = {
        "used": document["temperature"],
        "tried": document["temperatures"],
        "far_from_uniform": document["far_from_uniform"],
    }
    by_score = document.get("score_temperatures", {model.default_score: default})
    temperatures = list(default["far_from_uniform"])
    rows = []
    for score, found in by_score.items():
        tried = {f"{item['temperature']:g}": in_points(item) for item in found["tried"]}
        shares = found["far_from_uniform"]
        cells = [
            f"{shares[t]:.0%}<br>{tried[t]}" if t in tried else f"{shares[t]:.0%}"
            for t in temperatures
        ]
        rows.append([f"`{score}`", *cells, f"{found['used']:g}"])
    table = _table(["score, by temperature", *temperatures, "used"], rows)
    return (
        f"{table}\n\nShare of crops whose budget differs from uniform by more than a fifth, at "
        "0.1; below it the difference from 10, in points, on "
        f"{document['validation_rows']:,} validation rows. Used is *10, the paper's, unless "
        "another is better beyond doubt*."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _interval(item: Item) -> str:
    return f"{item['mean']:.3f} [{item['low']:.3f}, {item['high']:.3f}]"

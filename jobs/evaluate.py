"""How good the answers of runs are: `python -m jobs.evaluate OUTPUT … --reference COLUMN`.

The reference column is an input column that `recipe.input.keep` names, text or a list of texts.
Where rows have several prompts, `--lists` says what a list is: right answers to each of them
(`any`), or one entry for each prompt in order, text or a list again (`each`).

What is scored and counted are answer rows, one for each prompt; those that failed score 0. The
first run is compared with each other one, answer by answer: agreement, and the paired difference
of every metric. Prints tables, then one line of JSON.

Not covered: that answers about one image are not independent; where rows have several prompts the
intervals are too narrow.

Exit codes: 0, or 2 where a run cannot be evaluated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.intervals import MeanInterval, interval
from gc2ray.core.metrics.scores import METRICS, score
from gc2ray.data.store import Store
from gc2ray.output.parts import read_all_parts
from gc2ray.report.evaluation import ALL, agreement, evaluate


class Lists(StrEnum):
    """What a list of references is where rows have several prompts."""

    ANY = "any"
    EACH = "each"


@dataclass(frozen=True)
class Run:
    """The answers of a run, in order of `keys`; None where there is none."""

    output: str
    keys: list[str]
    answers: list[str | None]
    references: list[list[str]]
    groups: list[str]
    tokens: list[int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the runs that are named."""
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate", description=__doc__)
    parser.add_argument("output", nargs="+", help="output directory or URL of a run")
    parser.add_argument(
        "--reference", required=True, help="column with the right answer or answers"
    )
    parser.add_argument("--lists", choices=list(Lists), help="what a list of references is")
    parser.add_argument("--by", help="column to group answers by")
    parser.add_argument("--metric", action="append", choices=list(METRICS), help="default: all")
    chosen = parser.parse_args(arguments)
    metrics = chosen.metric or list(METRICS)
    try:
        runs = [
            read_run(output, chosen.reference, chosen.by, chosen.lists) for output in chosen.output
        ]
        document = {run.output: _evaluated(run, metrics) for run in runs}
        document |= {
            f"{runs[0].output} - {other.output}": _compared(runs[0], other, metrics)
            for other in runs[1:]
        }
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    for run in runs:
        console.print(_table(run, metrics, document[run.output]["scores"]))
    for other in runs[1:]:
        _print_comparison(console, document[f"{runs[0].output} - {other.output}"], other)
    print(json.dumps(document, default=asdict))
    return 0


def read_run(
    output: str, reference: str, group: str | None = None, lists: str | None = None
) -> Run:
    """Read a run's answers and references.

    Raises:
        ConfigError: There is no run, no such column, an answer without a reference, or `lists` is
            needed and not given.
    """
    columns = ["row_key", "prompt_index", "status", "answer", "visual_tokens_kept"]
    columns += ["newline_tokens", reference, *([group] if group else [])]
    table = read_all_parts(Store(output), columns).to_pydict()
    prompts, values = table["prompt_index"], table[reference]
    if lists is None and any(prompts) and any(isinstance(value, list) for value in values):
        raise ConfigError(
            f"{output}: rows have several prompts and a list in column {reference!r}; say "
            "--lists any where its entries are right for every prompt, --lists each where there is "
            "one for each"
        )
    if lists == Lists.EACH:
        values = [_entry(value, prompt) for value, prompt in zip(values, prompts, strict=True)]
    references = [_as_list(value) for value in values]
    if not all(references):
        key = table["row_key"][[bool(item) for item in references].index(False)]
        raise ConfigError(f"{output}: row {key} has no reference in column {reference!r}")
    answers = [
        answer if status == Status.OK else None
        for answer, status in zip(table["answer"], table["status"], strict=True)
    ]
    counts = zip(table["visual_tokens_kept"], table["newline_tokens"], strict=True)
    return Run(
        output=output,
        keys=table["row_key"],
        answers=answers,
        references=references,
        groups=[str(name) for name in table[group]] if group else [],
        tokens=[kept + newlines for kept, newlines in counts if kept is not None],
    )


def _entry(value: Any, prompt: int) -> Any:
    """The entry of a prompt; nothing where the list has none."""
    return value[prompt] if isinstance(value, list) and prompt < len(value) else None


def _as_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(item) for item in values if item is not None]


def _evaluated(run: Run, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "answers": len(run.keys),
        "failed": sum(answer is None for answer in run.answers),
        "visual_tokens_each": float(np.mean(run.tokens)) if run.tokens else None,
        "scores": evaluate(run.answers, run.references, run.groups, metrics),
    }


def _compared(first: Run, second: Run, metrics: Sequence[str]) -> dict[str, Any]:
    """Answers that both have, paired by key.

    Raises:
        ConfigError: There are none.
    """
    places = {key: place for place, key in enumerate(second.keys)}
    pairs = [(here, places[key]) for here, key in enumerate(first.keys) if key in places]
    if not pairs:
        raise ConfigError(f"{first.output} and {second.output} have no answer in common")
    references = [first.references[here] for here, _ in pairs]
    answers = [first.answers[here] for here, _ in pairs]
    others = [second.answers[there] for _, there in pairs]
    differences: dict[str, MeanInterval] = {}
    for metric in metrics:
        values = score(metric, answers, references) - score(metric, others, references)
        if not np.isnan(values).all():
            differences[metric] = interval(values)
    both = agreement(
        dict(zip(first.keys, first.answers, strict=True)),
        dict(zip(second.keys, second.answers, strict=True)),
    )
    return {
        "same": both.same,
        "only_first": both.only_first,
        "only_second": both.only_second,
        "differences": differences,
    }


def _table(run: Run, metrics: Sequence[str], scores: dict[str, dict[str, MeanInterval]]) -> Table:
    failed = sum(answer is None for answer in run.answers)
    tokens = f", {np.mean(run.tokens):.0f} visual tokens each" if run.tokens else ""
    title = f"{run.output}: {len(run.keys)} answers, {failed} failed{tokens}"
    table = Table(title=title, caption="95% bootstrap intervals; failed answers score 0")
    for column in ("group", "answers", *metrics):
        table.add_column(column)
    for name in sorted(scores, key=lambda group: (group != ALL, group)):
        found = scores[name]
        cells = [str(found[metric]) if metric in found else "-" for metric in metrics]
        table.add_row(name, str(max(item.rows for item in found.values())), *cells)
    return table


def _print_comparison(console: Console, compared: dict[str, Any], other: Run) -> None:
    console.print(
        f"against {other.output}: same answer on {compared['same']} of {compared['same'].rows} "
        f"prompts; {compared['only_first']} and {compared['only_second']} are in one run only",
        soft_wrap=True,
        markup=False,
    )
    for metric, found in compared["differences"].items():
        console.print(f"  {metric}: {found}", markup=False)


if __name__ == "__main__":
    sys.exit(main())

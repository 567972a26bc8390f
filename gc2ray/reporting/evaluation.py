"""How good the answers of runs are: against a column of right answers, and against each other.

The reference column is an input column that `recipe.input.keep` names, text or a list of texts.
What is scored and counted are answer rows, one for each prompt; those that failed score 0. The
first run is compared with each other one, answer by answer: agreement, and the paired difference
of every metric.

Not covered: that answers about one image are not independent; where rows have several prompts the
intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gc2ray.core.arguments import ReferenceLists
from gc2ray.core.config.yaml_models import unknown_key
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.intervals import MeanInterval, interval
from gc2ray.core.metrics.scores import METRICS, exact_match, reference_texts, score
from gc2ray.output.compact import answers_table
from gc2ray.output.verify import verify

ALL = "all"
"""Name of the group of all rows."""


@dataclass(frozen=True)
class Agreement:
    """How often two runs gave the same answer.

    Attributes:
        same: Share of the rows of both, by exact match; a row that failed in one is not the same.
        only_first: Rows that only the first run has.
        only_second: Rows that only the second run has.
    """

    same: MeanInterval
    only_first: int
    only_second: int


def agreement(first: Mapping[str, str | None], second: Mapping[str, str | None]) -> Agreement:
    """Compare two runs row by row.

    Args:
        first: Answer by row key, None where the row failed.
        second: Answer by row key of the other run.

    Raises:
        ValueError: They have no row in common.
    """
    shared = sorted(first.keys() & second.keys())
    pairs = [(key, first[key], second[key]) for key in shared]
    marks = [a is not None and b is not None and bool(exact_match(a, [b])) for _, a, b in pairs]
    return Agreement(
        same=interval(np.array(marks, dtype=np.float64)),
        only_first=len(first.keys() - second.keys()),
        only_second=len(second.keys() - first.keys()),
    )


def evaluate(
    answers: Sequence[str | None],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] = (),
    metrics: Sequence[str] = tuple(METRICS),
) -> dict[str, dict[str, MeanInterval]]:
    """Every metric over all rows (group `ALL`), and over the rows of each group.

    Args:
        answers: As in `score`.
        references: As in `score`.
        groups: One name for each row, or none at all.
        metrics: Keys of `METRICS`.

    Returns:
        Group to metric to interval; a metric that applies to no row of a group is left out.

    Raises:
        ValueError: A row has no reference, or lengths differ.
    """
    labels = np.array(list(groups) or [ALL] * len(answers))
    if len(labels) != len(answers):
        raise ValueError(f"{len(answers)} rows have {len(labels)} groups")
    scores: dict[str, dict[str, MeanInterval]] = {}
    for metric in metrics:
        values = score(metric, answers, references)
        parts = {ALL: values} | {str(name): values[labels == name] for name in np.unique(labels)}
        for name, part in parts.items():
            if not np.isnan(part).all():
                scores.setdefault(name, {})[metric] = interval(part)
    return scores


@dataclass(frozen=True)
class EvaluateRequest:
    """What is evaluated.

    Attributes:
        reference: Column with the right answer, or a list of them.
        metrics: Keys of `METRICS`; none: all of them.
        by: Column to group answers by.
        lists: A value of `ReferenceLists`; None: rows have one prompt, or references are no lists.
    """

    reference: str
    metrics: tuple[str, ...] = ()
    by: str | None = None
    lists: str | None = None

    def checked_metrics(self) -> tuple[str, ...]:
        """The metrics.

        Raises:
            ConfigError: One of them, or the value of `lists`, does not exist.
        """
        for metric in self.metrics:
            if metric not in METRICS:
                raise ConfigError(f"--metric: {unknown_key(metric, sorted(METRICS))}")
        if self.lists is not None and self.lists not in list(ReferenceLists):
            raise ConfigError(f"--lists: {unknown_key(self.lists, sorted(ReferenceLists))}")
        return self.metrics or tuple(METRICS)


@dataclass(frozen=True)
class RunScores:
    """How good the answers of a run are.

    Attributes:
        output: Output of the run.
        answers: How many there are.
        failed: How many of them failed; they score 0.
        unanswered_rows: Rows that are not answered yet, or were given up; they are not scored.
        visual_tokens_each: Visual and newline tokens of an answer, on average; None without any.
        scores: Group to metric to mean with its interval; the group `ALL` has all answers.
    """

    output: str
    answers: int
    failed: int
    unanswered_rows: int
    visual_tokens_each: float | None
    scores: dict[str, dict[str, MeanInterval]]


@dataclass(frozen=True)
class Comparison:
    """The first run against another one, over the answers that both have.

    Attributes:
        first: Output of the first run.
        second: Output of the other one.
        same: Share of answers that are the same.
        only_first: Answers that only the first run has.
        only_second: Answers that only the other run has.
        differences: By metric, the first run's score minus the other's, paired.
    """

    first: str
    second: str
    same: MeanInterval
    only_first: int
    only_second: int
    differences: dict[str, MeanInterval]


@dataclass(frozen=True)
class Evaluation:
    """The scores of runs.

    Attributes:
        metrics: What answers were scored by.
        runs: In the order in which they were named.
        comparisons: Comparisons of the first run with each other one.
    """

    metrics: tuple[str, ...]
    runs: tuple[RunScores, ...]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: runs by output, comparisons by `FIRST - SECOND`."""
        plain: dict[str, Any] = {}
        for run in self.runs:
            plain[run.output] = asdict(run)
            del plain[run.output]["output"]
        for compared in self.comparisons:
            values = asdict(compared)
            plain[f"{values.pop('first')} - {values.pop('second')}"] = values
        return plain


@dataclass(frozen=True)
class _Run:
    """The latest answers of a run, in order of `keys`; None where an answer failed."""

    output: str
    unanswered_rows: int
    keys: list[str]
    answers: list[str | None]
    references: list[list[str]]
    groups: list[str]
    tokens: list[int]


def evaluate_runs(outputs: Sequence[str], request: EvaluateRequest) -> Evaluation:
    """Score the latest answers of runs.

    Args:
        outputs: Directories or URLs of the runs.
        request: What they are scored against, and how.

    Raises:
        ConfigError: There is no run, no such column or metric, an answer has no reference, or
            `lists` is needed and not given.
        OSError: A storage does not answer.
    """
    metrics = request.checked_metrics()
    runs = [_read(output, request) for output in outputs]
    return Evaluation(
        metrics=metrics,
        runs=tuple(_scored(run, metrics) for run in runs),
        comparisons=tuple(_compared(runs[0], other, metrics) for other in runs[1:]),
    )


def _read(output: str, request: EvaluateRequest) -> _Run:
    reference, group = request.reference, request.by
    columns = ["row_key", "prompt_index", "status", "answer", "visual_tokens_kept"]
    columns += ["newline_tokens", reference, *([group] if group else [])]
    verdict = verify(output)
    table = answers_table(output, verdict, list(dict.fromkeys(columns))).to_pydict()
    if not table["row_key"]:
        raise ConfigError(f"{output}: holds no answers yet")
    answers = [
        answer if status == Status.OK else None
        for answer, status in zip(table["answer"], table["status"], strict=True)
    ]
    counts = zip(table["visual_tokens_kept"], table["newline_tokens"], strict=True)
    return _Run(
        output=output,
        unanswered_rows=verdict.planned_rows - verdict.rows,
        keys=table["row_key"],
        answers=answers,
        references=_references(output, table, request),
        groups=[str(name) for name in table[group]] if group else [],
        tokens=[kept + newlines for kept, newlines in counts if kept is not None],
    )


def _references(output: str, table: Mapping[str, Any], request: EvaluateRequest) -> list[list[str]]:
    """The right answers of each answer row; at least one."""
    reference, lists = request.reference, request.lists
    prompts, values = table["prompt_index"], table[reference]
    if lists is None and any(prompts) and any(isinstance(value, list) for value in values):
        raise ConfigError(
            f"{output}: rows have several prompts and a list in column {reference!r}; say "
            "--lists any where its entries are right for every prompt, --lists each where there is "
            "one for each"
        )
    if lists == ReferenceLists.EACH:
        values = [_entry(value, prompt) for value, prompt in zip(values, prompts, strict=True)]
    references = [reference_texts(value) for value in values]
    if not all(references):
        key = table["row_key"][[bool(item) for item in references].index(False)]
        hint = "; --lists each takes from a list the entry of each prompt"
        raise ConfigError(
            f"{output}: row {key} has no reference in column {reference!r}"
            f"{hint if lists == ReferenceLists.EACH else ''}"
        )
    return references


def _entry(value: Any, prompt: int) -> Any:
    """The entry of a prompt; nothing where the list has none."""
    return value[prompt] if isinstance(value, list) and prompt < len(value) else None


def _scored(run: _Run, metrics: Sequence[str]) -> RunScores:
    return RunScores(
        output=run.output,
        answers=len(run.keys),
        failed=sum(answer is None for answer in run.answers),
        unanswered_rows=run.unanswered_rows,
        visual_tokens_each=float(np.mean(run.tokens)) if run.tokens else None,
        scores=evaluate(run.answers, run.references, run.groups, metrics),
    )


def _compared(first: _Run, second: _Run, metrics: Sequence[str]) -> Comparison:
    """Answers that both runs have, paired by key.

    Raises:
        ConfigError: There are none.
    """
    indices = {key: index for index, key in enumerate(second.keys)}
    pairs = [(here, indices[key]) for here, key in enumerate(first.keys) if key in indices]
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
    return Comparison(
        first=first.output,
        second=second.output,
        same=both.same,
        only_first=both.only_first,
        only_second=both.only_second,
        differences=differences,
    )

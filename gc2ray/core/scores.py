"""How good answers are: scores against references, with intervals, and agreement of two runs.

Scores are by row, in [0, 1]. Intervals are 95% percentile bootstraps over rows (Efron, 1979); for a
difference of two runs rows are paired. Nothing here reads files or knows models.

Sources: VQA accuracy, Antol et al. 2015 (arXiv 1505.00468), section 4 of its evaluation: the mean
over leaving one reference out of min(matches / 3, 1). ANLS, Biten et al. 2019 (arXiv 1905.13648):
1 - edit distance / longer length, 0 below 0.5, the best reference counts.

Not covered: judgement by models, CIDEr and the like, contractions in VQA's normalisation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

RESAMPLES = 2000
CONFIDENCE = 0.95
ANLS_THRESHOLD = 0.5
ALL = "all"
"""Name of the group of all rows."""
VQA_MATCHES = 3
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})


# ------------------------------------------------------------------------------------------ scores


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, but for case, outer space and a final stop."""
    return float(_plain(answer) in {_plain(reference) for reference in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """1 where a reference occurs in the answer as whole words."""
    words = f" {' '.join(_words(answer))} "
    found = (" ".join(_words(reference)) for reference in references)
    return float(any(text and f" {text} " in words for text in found))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Soft accuracy: full marks for an answer that three references gave.

    With four references or more it is VQA's; with fewer, all but one of them are needed, and with
    one alone it is a match after VQA's normalisation.
    """
    given = _vqa(answer)
    matches = [_vqa(reference) == given for reference in references]
    if len(matches) == 1:
        return float(matches[0])
    needed = min(VQA_MATCHES, len(matches) - 1)
    others = [sum(matches) - match for match in matches]
    return sum(min(1.0, count / needed) for count in others) / len(matches)


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer, the best reference counting."""
    given = _plain(answer)
    best = max(
        Levenshtein.normalized_similarity(given, _plain(reference)) for reference in references
    )
    return best if best >= ANLS_THRESHOLD else 0.0


def yes_no(answer: str, references: Sequence[str]) -> float | None:
    """1 where the answer's first word is the reference's yes or no; None for other references."""
    wanted = {_plain(reference) for reference in references} & {"yes", "no"}
    if not wanted:
        return None
    words = _words(answer)
    return float(bool(words) and words[0] in wanted)


def similarity(answer: str, other: str) -> float:
    """1 where two answers are the same, but for case, outer space and a final stop; else less.

    Normalised Levenshtein similarity: 1 - edits / length of the longer one.
    """
    return float(Levenshtein.normalized_similarity(_plain(answer), _plain(other)))


METRICS: dict[str, Callable[[str, Sequence[str]], float | None]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "contains": contains,
    "anls": anls,
    "yes_no": yes_no,
}
"""By name; None where the metric says nothing about a row."""


def score(
    metric: str, answers: Sequence[str | None], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """Scores of rows, float64 (R,); NaN where the metric does not apply.

    Args:
        metric: A key of `METRICS`.
        answers: None for a row that failed: it scores 0 wherever the metric applies.
        references: At least one for each row.

    Raises:
        ValueError: A row has no reference.
    """
    measure = METRICS[metric]
    scores = []
    for row, (answer, right) in enumerate(zip(answers, references, strict=True)):
        if not right:
            raise ValueError(f"row {row} has no reference")
        value = measure(answer or "", right)
        scores.append(np.nan if value is None else value if answer is not None else 0.0)
    return np.array(scores, dtype=np.float64)


# --------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A mean over rows, and where it lies with 95% confidence."""

    mean: float
    low: float
    high: float
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is distinguishable from none."""
        return self.low > 0 or self.high < 0


def interval(values: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of values with its bootstrap interval; NaN are left out.

    Rows with equal values are interchangeable, so resamples are drawn as counts of the distinct
    values: a million rows take no longer than a thousand.

    Raises:
        ValueError: There are no values.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("no rows to take a mean of")
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        len(values), counts / len(values), size=resamples
    )
    means = drawn @ distinct / len(values)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def ratio(above: np.ndarray, below: np.ndarray, seed: int = 0) -> Interval:
    """Sum of one measure over the sum of another, of groups of rows that are alike within.

    Groups are resampled, both measures together; as few groups make a bootstrap too narrow, it is
    widened by sqrt(n / (n - 1)). One group says nothing of others: its interval has no end.

    Args:
        above: By group, float64 (G,).
        below: Likewise; its sum is above 0.
        seed: Of the resamples.

    Raises:
        ValueError: There are no groups, or nothing to divide by.
    """
    groups = len(above)
    if not groups or below.sum() <= 0:
        raise ValueError("no rows to take a ratio of")
    mean = float(above.sum() / below.sum())
    if groups == 1:
        return Interval(mean, -np.inf, np.inf, groups)
    drawn = np.random.default_rng(seed).multinomial(
        groups, np.full(groups, 1 / groups), size=RESAMPLES
    )
    ratios = (drawn @ above) / np.maximum(drawn @ below, np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wide = np.sqrt(groups / (groups - 1))
    return Interval(
        mean, float(mean - wide * (mean - low)), float(mean + wide * (high - mean)), groups
    )


def difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> Interval:
    """Mean of ours minus theirs on the same rows, paired.

    Raises:
        ValueError: They are not of one length.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} rows cannot be paired")
    return interval(ours - theirs, seed)


@dataclass(frozen=True)
class Agreement:
    """How often two runs gave the same answer.

    Attributes:
        same: Over the rows of both, by exact match; a row that failed in one agrees with nothing.
        differing: Their keys, in order.
        only_first: Rows that only the first run has.
        only_second: Likewise.
    """

    same: Interval
    differing: tuple[str, ...]
    only_first: int
    only_second: int


def agreement(first: Mapping[str, str | None], second: Mapping[str, str | None]) -> Agreement:
    """Compare two runs row by row.

    Args:
        first: Answer by row key, None where the row failed.
        second: Likewise.

    Raises:
        ValueError: They have no row in common.
    """
    shared = sorted(first.keys() & second.keys())
    pairs = [(key, first[key], second[key]) for key in shared]
    marks = [a is not None and b is not None and bool(exact_match(a, [b])) for _, a, b in pairs]
    return Agreement(
        same=interval(np.array(marks, dtype=np.float64)),
        differing=tuple(key for key, mark in zip(shared, marks, strict=True) if not mark),
        only_first=len(first.keys() - second.keys()),
        only_second=len(second.keys() - first.keys()),
    )


def evaluate(
    answers: Sequence[str | None],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] = (),
    metrics: Sequence[str] = tuple(METRICS),
) -> dict[str, dict[str, Interval]]:
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
    found: dict[str, dict[str, Interval]] = {}
    for metric in metrics:
        values = score(metric, answers, references)
        parts = {ALL: values} | {str(name): values[labels == name] for name in np.unique(labels)}
        for name, part in parts.items():
            if not np.isnan(part).all():
                found.setdefault(name, {})[metric] = interval(part)
    return found


# --------------------------------------------------------------------------------------- spelling


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".").rstrip()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['.,][^\W_]+)*", _plain(text))


def _vqa(text: str) -> str:
    """Articles off, numbers up to ten as digits, punctuation off."""
    words = [word for word in _words(text) if word not in _ARTICLES]
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words)

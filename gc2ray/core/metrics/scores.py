"""How right an answer is, and how alike two are: one function a metric."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

ANLS_THRESHOLD = 0.5
VQA_MATCHES = 3
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})


def reference_texts(value: Any) -> list[str]:
    """The right answers in a value of a reference column, which is a text or a list of them."""
    plain = value.as_py() if hasattr(value, "as_py") else value
    values = plain if isinstance(plain, list) else [plain]
    return [str(item) for item in values if item is not None]


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, but for case, outer space and a final stop."""
    return float(_plain(answer) in {_plain(reference) for reference in references})


def contains(answer: str, references: Sequence[str]) -> float:
    """1 where a reference occurs in the answer as whole words."""
    words = f" {' '.join(_words(answer))} "
    texts = (" ".join(_words(reference)) for reference in references)
    return float(any(text and f" {text} " in words for text in texts))


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


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(".").rstrip()


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['.,][^\W_]+)*", _plain(text))


def _vqa(text: str) -> str:
    """Articles off, numbers up to ten as digits, punctuation off."""
    words = [word for word in _words(text) if word not in _ARTICLES]
    return " ".join(str(_NUMBERS.index(word)) if word in _NUMBERS else word for word in words)


METRICS: dict[str, Callable[[str, Sequence[str]], float | None]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "contains": contains,
    "anls": anls,
    "yes_no": yes_no,
}
"""By name; None where the metric says nothing about a row."""

"""Scores of answers, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gc2ray.core.intervals import difference, interval
from gc2ray.core.metrics.scores import (
    METRICS,
    anls,
    contains,
    exact_match,
    score,
    vqa_accuracy,
    yes_no,
)
from gc2ray.reporting.evaluation import ALL, agreement, evaluate


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("7", "7", 1), (" Top  Left. ", "top left", 1), ("\uff17", "7", 1), ("17", "7", 0),
        ("", "7", 0), ("the 7", "7", 0), ("STRASSE", "straße", 1),
    ],
)  # fmt: skip
def test_exact_match(answer: str, reference: str, right: int) -> None:
    assert exact_match(answer, ["nothing", reference]) == right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("It is a red 7, I think", "red 7", 1), ("seventeen 17", "7", 0), ("a cat", "cats", 0),
        ("A Cat!", "cat", 1), ("anything", "", 0), ("", "cat", 0), ("3.5 m", "3", 0),
    ],
)  # fmt: skip
def test_contains_whole_words(answer: str, reference: str, right: int) -> None:
    assert contains(answer, [reference]) == right


def test_vqa_accuracy_is_the_mean_over_leaving_one_out() -> None:
    ten = ["two"] * 2 + ["3"] * 8
    # Left out one of the two that match (2 of 10 times): 1/3; else 2/3.
    assert vqa_accuracy("2", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("3.", ten) == 1
    assert vqa_accuracy("four", ten) == 0
    four_of_ten = ["yes"] * 4 + ["no"] * 6
    assert vqa_accuracy("Yes", four_of_ten) == 1
    assert vqa_accuracy("the dog", ["a dog"]) == 1, "one reference: a match, articles aside"
    assert vqa_accuracy("dog", ["dog", "cat"]) == pytest.approx(0.5)


def test_anls() -> None:
    assert anls("hello", ["hello", "x"]) == 1
    assert anls("hallo", ["hello"]) == pytest.approx(0.8)
    assert anls("abcd", ["abxy"]) == pytest.approx(0.5), "the threshold itself counts"
    assert anls("abcd", ["axyz"]) == 0, "below a half nothing counts"
    assert anls("", ["hello"]) == 0


def test_yes_no() -> None:
    assert yes_no("Yes, there is.", ["yes"]) == 1
    assert yes_no("there is, yes", ["yes"]) == 0
    assert yes_no("no", ["yes"]) == 0
    assert yes_no("", ["no"]) == 0
    assert yes_no("yes", ["7"]) is None


@pytest.mark.parametrize("metric", METRICS)
@given(
    answer=st.text(max_size=20), references=st.lists(st.text(max_size=20), min_size=1, max_size=12)
)
def test_scores_lie_between_0_and_1_whatever_the_text(
    metric: str, answer: str, references: list[str]
) -> None:
    value = METRICS[metric](answer, references)
    assert value is None or 0 <= value <= 1


def test_a_failed_row_scores_0_where_the_metric_applies() -> None:
    scores = score("yes_no", [None, "yes", None], [["yes"], ["yes"], ["7"]])
    assert scores[:2].tolist() == [0, 1]
    assert np.isnan(scores[2])
    assert score("exact_match", [None], [[""]]).tolist() == [0], "a failure is no empty answer"
    with pytest.raises(ValueError, match="row 1 has no reference"):
        score("exact_match", ["a", "b"], [["a"], []])


def test_the_interval_equals_the_bootstraps() -> None:
    """Against resampling row by row, which it must equal up to the noise of the draws."""
    values = np.random.default_rng(0).beta(2, 1, 300)
    draw = np.random.default_rng(1)
    means = [values[draw.integers(300, size=300)].mean() for _ in range(4000)]
    found = interval(values, resamples=4000)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.003)
    assert found.rows == 300


def test_score_intervals_have_their_stated_coverage() -> None:
    draw = np.random.default_rng(2)
    covered = 0
    for seed in range(300):
        found = interval((draw.random(200) < 0.7).astype(float), seed=seed, resamples=500)
        covered += found.low <= 0.7 <= found.high
    assert 0.90 < covered / 300 < 0.99


def test_a_difference_is_paired() -> None:
    """Ours is right on one row in 40 more, everywhere else the same: small, and beyond doubt."""
    theirs = (np.arange(400) % 2).astype(float)
    ours = theirs.copy()
    ours[::40] = 1
    found = difference(ours, theirs)
    assert found.mean == pytest.approx(10 / 400)
    assert found.low > 0
    assert difference(theirs, theirs).low == 0
    unpaired = interval(ours).low - interval(theirs).high
    assert unpaired < 0, "unpaired intervals overlap"
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(ours, theirs[1:])


def test_an_interval_leaves_nan_out_and_needs_a_row() -> None:
    assert interval(np.array([1.0, np.nan])).rows == 1
    with pytest.raises(ValueError, match="no rows"):
        interval(np.array([np.nan]))


def test_evaluate_groups_rows() -> None:
    found = evaluate(["7", "no", None], [["7"], ["yes"], ["yes"]], ["digit", "yesno", "yesno"])
    assert found[ALL]["exact_match"].mean == pytest.approx(1 / 3)
    assert found["digit"]["exact_match"].mean == 1
    assert "yes_no" not in found["digit"]
    assert found["yesno"]["yes_no"].rows == 2
    with pytest.raises(ValueError, match="3 rows have 1 groups"):
        evaluate(["a", "b", "c"], [["a"]] * 3, ["x"])


def test_agreement_pairs_rows_by_key() -> None:
    found = agreement({"a": "7", "b": "8", "c": None, "d": "x"}, {"b": "9", "a": "7.", "c": None})
    assert found.same.mean == pytest.approx(1 / 3), "two failures are no agreement"
    assert (found.only_first, found.only_second) == (1, 0)

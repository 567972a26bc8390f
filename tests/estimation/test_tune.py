"""Tuning on engines whose speed and quality are known, and on a real one."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from gc2ray.core.config.job import load_job
from gc2ray.core.errors import BadRow, ConfigError, Status
from gc2ray.core.intervals import MeanInterval
from gc2ray.core.records import UNCOMPRESSED, Answer, Request
from gc2ray.estimation.hardware import Prices
from gc2ray.estimation.recommendation import Criteria, Measured, Target, Tuning, judge, lower
from gc2ray.estimation.trials import BASELINE, CompressionSetting, Trials, measure, references_of
from gc2ray.estimation.tune import TuneRequest, compared_settings
from gc2ray.reporting.terminal_tables import print_tuning
from tests.support.commands import job_file, run_command
from tests.support.fakes import echo
from tests.support.rows import request

HALF, TENTH = CompressionSetting("globalcom2", 0.5), CompressionSetting("globalcom2", 0.1)
BY_POLICY = {UNCOMPRESSED: BASELINE, HALF.name: HALF, TENTH.name: TENTH}
RIGHT = "right"


@dataclass
class Known:
    """An engine with a clock: seconds a row, and how often a row is answered right.

    What is right in a setting is right in every better one, as a rule of thumb has it.
    """

    seconds: dict[CompressionSetting, float]
    accuracy: dict[CompressionSetting, float] = field(default_factory=dict)
    growth: float = 0.0
    seed: int = 0
    now: float = 0.0
    cache_clears: int = 0
    seen: list[tuple[int, str]] = field(default_factory=list)

    def clear_cache(self) -> None:
        self.cache_clears += 1

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        asked = list(requests)
        self.seen.append((len(asked), asked[0].policy))
        for row in asked:
            setting = BY_POLICY[row.policy]
            self.now += self.seconds[setting] * (1 + self.growth * self.now)
            luck = random.Random(f"{self.seed}/{row.row_key}").random()
            good = luck < self.accuracy.get(setting, 1.0)
            yield echo(row, answer=RIGHT if good else f"wrong {luck}", visual_tokens_kept=7)


def rows(count: int = 80) -> list[Request]:
    alike = request((25, 30))
    return [replace(alike, row=n, row_key=f"a#{n}") for n in range(count)]


def tuning(engine: Known, question: Criteria, count: int = 80) -> Tuning:
    trials = measure(engine, rows(count), [HALF, TENTH], clock=lambda: engine.now)
    return judge(trials, question)


def agreement(share: float) -> Criteria:
    return Criteria(Target(min_agreement=share), {})


SPEEDS = {BASELINE: 1.0, HALF: 0.5, TENTH: 0.2}


def test_every_block_is_answered_in_every_setting_from_nothing() -> None:
    engine = Known(SPEEDS)
    trials = measure(engine, rows(), [HALF, TENTH], clock=lambda: engine.now)
    assert trials.settings == (BASELINE, HALF, TENTH)
    assert trials.seconds.shape == (8, 3)
    assert trials.rows.tolist() == [10] * 8
    assert engine.cache_clears == 8 * 3
    orders = [tuple(policy for _, policy in engine.seen[at : at + 3]) for at in range(3, 27, 3)]
    assert all(set(order) == set(BY_POLICY) for order in orders)
    assert len(set(orders)) > 2, "the order is drawn"
    assert trials.seconds[:, 1].tolist() == pytest.approx([5.0] * 8)
    assert all(len(answers) == 80 for answers in trials.answers.values())


def test_drift_affects_all_settings_equally() -> None:
    """A device that slows down to a third while it is measured."""
    engine = Known(SPEEDS, growth=0.01)
    found = tuning(engine, agreement(0.9))
    assert engine.now > 1.5 * 90 * sum(SPEEDS.values()), "it did not slow down"
    for item, expected in zip(found.measured, (1.0, 2.0, 5.0), strict=True):
        assert item.speed_up.low <= expected <= item.speed_up.high
    assert found.measured[0].speed_up.mean == 1.0


def test_the_fastest_that_meets_the_target_is_recommended() -> None:
    engine = Known(SPEEDS, {BASELINE: 1.0, HALF: 1.0, TENTH: 0.5})
    found = tuning(engine, agreement(0.9))
    assert found.recommended == HALF
    assert "Use globalcom2 at 0.5: 2.00 times as fast" in found.verdict
    assert [item.meets for item in found.measured] == [True, True, False]
    assert tuning(engine, agreement(0.3)).recommended == TENTH


def test_compression_that_does_not_pay_is_not_recommended() -> None:
    slow = Known({BASELINE: 1.0, HALF: 1.1, TENTH: 1.0})
    found = tuning(slow, agreement(0.9))
    assert found.recommended == BASELINE
    assert found.verdict.startswith(
        "Compression does not pay here: the fastest setting that meets the target"
    )
    bad = Known(SPEEDS, {BASELINE: 1.0, HALF: 0.5, TENTH: 0.4})
    found = tuning(bad, agreement(0.9))
    assert found.recommended == BASELINE
    assert "no compressed setting meets the target with 90 % confidence" in found.verdict


def test_a_target_that_nothing_meets_is_reported() -> None:
    engine = Known(SPEEDS, {BASELINE: 0.6, HALF: 0.5, TENTH: 0.4})
    references = {row.row_key: [RIGHT] for row in rows()}
    question = Criteria(Target(min_accuracy=0.9), references)
    found = tuning(engine, question)
    assert found.recommended is None
    assert "No setting meets the target with 90 % confidence" in found.verdict
    assert "none at 1" in found.verdict


@pytest.mark.parametrize(("share", "needed"), [(0.9, 15), (0.95, 32), (0.99, 163)])
def test_a_sample_too_small_for_the_target_says_how_many_rows_it_takes(
    share: float, needed: int
) -> None:
    """The number is exact: with one row less nothing can be shown, with so many it can."""
    few = tuning(Known(SPEEDS), agreement(share), needed - 1)
    assert few.recommended is None
    assert f"{needed - 1} answers are too few to show an agreement of {share:g}" in few.verdict
    assert f"it takes {needed} that all agree" in few.verdict
    assert tuning(Known(SPEEDS), agreement(share), needed).recommended == TENTH


def test_a_budget_that_nothing_meets_names_the_cheapest() -> None:
    question = Criteria(Target(budget_usd=1e-9), {}, usd_per_hour=3.6, total_rows=100_000)
    found = tuning(Known(SPEEDS), question)
    assert found.recommended is None
    assert found.verdict.endswith("the cheapest is globalcom2 at 0.1.")


def test_no_sample_shows_that_all_answers_agree() -> None:
    found = tuning(Known(SPEEDS), agreement(1.0))
    assert found.recommended is None
    assert found.verdict == "No sample shows an agreement of 1; choose a lower --min-agreement."


def test_accuracy_is_against_references_and_failures_count() -> None:
    engine = Known(SPEEDS, {BASELINE: 0.97, HALF: 0.96, TENTH: 0.6})
    references = {row.row_key: [RIGHT, "also right"] for row in rows(400)}
    found = tuning(engine, Criteria(Target(min_accuracy=0.9), references), 400)
    assert found.recommended == HALF
    whole, half, tenth = (item.accuracy for item in found.measured)
    assert whole is not None
    assert half is not None
    assert tenth is not None
    assert whole.mean > half.mean > 0.9 > tenth.mean


def test_a_budget_buys_the_best_quality() -> None:
    engine = Known(SPEEDS, {BASELINE: 1.0, HALF: 0.9, TENTH: 0.5})
    for budget, expected in (
        (101.0, BASELINE),
        (60.0, HALF),
        (25.0, TENTH),
        (1.0, None),
    ):
        question = Criteria(
            Target(budget_usd=budget), {}, usd_per_hour=3.6, total_rows=100_000
        )  # 100, 50 and 20 dollars
        assert tuning(engine, question).recommended == expected


def test_the_front_holds_undominated_settings() -> None:
    engine = Known(
        {BASELINE: 1.0, HALF: 1.2, TENTH: 0.2},
        {BASELINE: 1.0, HALF: 0.7, TENTH: 0.6},
    )
    found = tuning(engine, agreement(0.9))
    assert [item.on_front for item in found.measured] == [True, False, True]


@pytest.mark.parametrize(("mean", "rows_", "bound"), [(1.0, 100, 0.984), (0.95, 400, 0.934)])
def test_the_bound_is_wilsons(mean: float, rows_: int, bound: float) -> None:
    """At 90 % from below: n / (n + z^2) where everything is right."""
    assert lower(MeanInterval(0, mean, 1, rows_)) == pytest.approx(bound, abs=0.001)
    assert lower(MeanInterval(0, 1.0, 1, 50)) == pytest.approx(
        50 / (50 + NormalDist().inv_cdf(0.9) ** 2)
    )


def test_recommendations_keep_their_promise_nine_times_in_ten() -> None:
    """Many samples of rows whose truth is known: the target is really met, and at what cost."""
    accuracy = {BASELINE: 0.95, HALF: 0.93, TENTH: 0.885}
    met, cheap, trials = 0, 0, 200
    for seed in range(trials):
        engine = Known(SPEEDS, accuracy, seed=seed)
        references = {row.row_key: [RIGHT] for row in rows(400)}
        found = tuning(engine, Criteria(Target(min_accuracy=0.9), references), 400)
        chosen = found.recommended
        met += chosen is not None and accuracy[chosen] >= 0.9
        cheap += chosen is not None and SPEEDS[chosen] <= 1.25 * SPEEDS[HALF]
    assert met / trials >= 0.9
    assert cheap / trials >= 0.8


def test_rows_that_cannot_be_answered_are_left_out() -> None:
    fault = BadRow(Status.BAD_IMAGE, "no image")
    asked = [replace(row, fault=fault) if row.row % 2 else row for row in rows(20)]
    engine = Known(SPEEDS)
    trials = measure(engine, asked, [HALF], clock=lambda: engine.now)
    assert trials.rows.sum() == 10
    with pytest.raises(ConfigError, match="has 3 rows that can be answered, too few to compare"):
        measure(engine, asked[:6], [HALF])


def test_nothing_to_compare_with_is_reported() -> None:
    failed = {row.row_key: echo(row, status=Status.TOO_LONG, answer=None) for row in rows(4)}
    answers = {BASELINE.name: failed, HALF.name: failed}
    trials = Trials((BASELINE, HALF), np.ones((2, 2)), np.array([2, 2]), answers)
    with pytest.raises(ConfigError, match="no row of the sample could be answered"):
        judge(trials, agreement(0.9))


def test_references_are_texts_or_lists_of_them() -> None:
    asked = [
        replace(row, kept_columns={"right": value})
        for row, value in zip(rows(3), ("a", ["b", None, "c"], 7), strict=True)
    ]
    assert references_of(asked, "right") == {"a#0": ["a"], "a#1": ["b", "c"], "a#2": ["7"]}
    assert references_of(asked, "other") == {}


def wish(**changes: object) -> TuneRequest:
    usual: dict = {
        "rows": 12, "methods": (), "retentions": (), "target": Target(), "reference": None,
        "prices": Prices(()),
    }  # fmt: skip
    return TuneRequest(**usual | changes)


def test_settings_are_the_recipes_method_at_all_retentions(tmp_path: Path) -> None:
    job = load_job(job_file(tmp_path, Path("model")))
    assert [s.retention for s in compared_settings(job, wish())] == [0.75, 0.5, 0.25, 0.1, 0.05]
    both = compared_settings(job, wish(methods=("local", "thumbnail"), retentions=(0.3,)))
    assert both == [CompressionSetting("local", 0.3), CompressionSetting("thumbnail", 1.0)]
    plain = load_job(job_file(tmp_path, Path("model")), ["recipe.compression={method: none}"])
    assert compared_settings(plain, wish(retentions=(0.3,))) == [
        CompressionSetting("globalcom2", 0.3)
    ]
    assert wish().checked_target() == Target(min_agreement=0.95)


def test_the_command_measures_and_recommends(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    config = job_file(tmp_path, tiny_paths["vicuna"], rows=24)
    words = ("tune", config, "--rows", "24", "--retention", "0.5", "--retention", "0.1")
    result = run_command(*words, "--min-agreement", "0")
    assert result.exit_code == 0, result.stderr
    drawing = tmp_path / "front.svg"
    refused = run_command(*words, "--svg", tmp_path / "nowhere" / "front.svg")
    assert (refused.exit_code, "cannot be written" in refused.stderr) == (2, True)
    assert "No cost: the hardware table has no on-demand price of cpu; use" in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if "│" in line) <= 80
    assert "none at 1" in result.stdout
    assert "globalcom2 at 0.1" in result.stdout
    assert re.search(r"(Use globalcom2 at 0\.\d|Compression does not pay here)", result.stdout)
    priced = run_command(*words, "--json", "--usd-per-hour", "1", "--svg", drawing)
    found = json.loads(priced.stdout)
    root = ElementTree.fromstring(drawing.read_text())
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"none at 1", "globalcom2 at 0.5", "globalcom2 at 0.1"} <= set(texts)
    assert [item["setting"]["retention"] for item in found["measured"]] == [1.0, 0.5, 0.1]
    tokens = [item["visual_tokens"] for item in found["measured"]]
    assert tokens == sorted(tokens, reverse=True)
    assert found["measured"][0]["agreement"]["mid"] == 1.0
    assert all(item["usd"] > 0 for item in found["measured"])
    assert found["no_cost"] is None
    assert not math.isnan(found["measured"][1]["speed_up"]["mid"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-agreement", "0.9", "--budget-usd", "3"], "give one of --min-agreement"),
        (["--min-accuracy", "0.9"], "--min-accuracy needs --reference"),
        (["--reference", "truth"], "recipe.input.keep does not name 'truth'"),
        (["--method", "magic"], "no method 'magic'"),
        (["--retention", "1.5"], "the fraction KEPT, in (0, 1]; got 1.5"),
        (["--budget-usd", "3"], "no price of cpu is known"),
    ],
)
def test_invalid_options_are_refused_before_the_model_is_loaded(
    tiny_paths: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(
        "gc2ray.estimation.tune.load_recipe_model",
        lambda *_, **__: pytest.fail("a model was loaded"),
    )
    result = run_command("tune", job_file(tmp_path, tiny_paths["vicuna"]), *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_widest_table_fits_80_columns() -> None:
    share = MeanInterval(0.95, 0.975, 1.0, rows=200)
    item = Measured(
        CompressionSetting("globalcom2", 0.25), 0.123, share, 612.0, share, share, 1234.0,
        meets=True, on_front=True,
    )  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    print_tuning(console, Tuning((item,), item.setting, "Use it."))
    table = console.export_text()
    names = r"setting +.tokens.ms/row.speed-up +.agreement.accuracy +.all rows.target"
    assert re.search(names, table)
    assert "globalcom2 at 0.25" in table
    assert "…" not in table

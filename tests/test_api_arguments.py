"""Arguments of the Python API: locations, single values for lists, numbers out of range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gc2ray
from gc2ray.core.arguments import as_tuple, check_range
from tests.support.outputs import first_plan, write_round
from tests.support.rows import make_job

OUTPUTS: dict[str, Callable[[Any, Path], Any]] = {
    "status": lambda output, _: gc2ray.status(output).outcome.rows,
    "verify": lambda output, _: gc2ray.verify(output).problems,
    "read_answers": lambda output, _: gc2ray.read_answers(output).num_rows,
    "retry": lambda output, _: gc2ray.retry(output).retry_round,
    "compact": lambda output, folder: gc2ray.compact(output, folder).rows,
    "report": lambda output, folder: len(gc2ray.report(output, to=folder).files),
    "evaluate": lambda output, _: gc2ray.evaluate(output, reference="source").runs[0].answers,
}
"""Functions that read an output without its model, each called with a new folder to write to."""

NAN, INFINITE = float("nan"), float("inf")
OUT_OF_RANGE: list[tuple[str, Callable[[Any, str], object]]] = [
    ("rows: .* at least 1; got 0", lambda job, _: gc2ray.estimate(job, rows=0)),
    ("hours: .* at least 0.01; got 0", lambda job, _: gc2ray.estimate(job, hours=0)),
    ("hours: .* got inf", lambda job, _: gc2ray.estimate(job, hours=INFINITE)),
    ("output_tokens: .* got nan", lambda job, _: gc2ray.estimate(job, output_tokens=NAN)),
    ("rows: .* at least 1; got -1", lambda job, _: gc2ray.check(job, rows=-1)),
    ("rows: .* at least 4; got 3", lambda job, _: gc2ray.tune(job, rows=3)),
    ("min_agreement: .* 0 to 1; got 95", lambda job, _: gc2ray.tune(job, min_agreement=95)),
    ("min_accuracy: .* 0 to 1", lambda job, _: gc2ray.tune(job, min_accuracy=-0.1)),
    ("budget_usd: .* got nan", lambda job, _: gc2ray.tune(job, budget_usd=NAN)),
    ("usd_per_hour: .* at least 0", lambda job, _: gc2ray.tune(job, usd_per_hour=-1)),
    ("--retention: .*KEPT.* got 2", lambda job, _: gc2ray.tune(job, retentions=2)),
    ("--method: no method 'gone'", lambda job, _: gc2ray.tune(job, methods="gone")),
    ("usd_per_hour: .* got inf", lambda _, out: gc2ray.report(out, usd_per_hour=INFINITE)),
    ("show: .* at least 0; got -1", lambda _, out: gc2ray.report(out, show=-1)),
    ("price: .*known: on_demand, spot", lambda _, out: gc2ray.report(out, price="cheap")),
    ("no row 'in.parquet#0'", lambda _, out: gc2ray.report(out, rows="in.parquet#0")),
    ("file_bytes: .* at least 1", lambda _, out: gc2ray.compact(out, f"{out}-c", file_bytes=0)),
    ("at least one output", lambda _, out: gc2ray.report()),
    ("at least one output", lambda _, out: gc2ray.evaluate(reference="source")),
    ("'ded': is not a failure", lambda _, out: gc2ray.retry(out, statuses="ded")),
    (
        "--metric: unknown 'exact'",
        lambda _, out: gc2ray.evaluate(out, reference="source", metrics="exact"),
    ),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    write_round(folder, 0, first_plan())
    return folder


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_paths_or_text(output: Path, tmp_path: Path, name: str) -> None:
    of_path = OUTPUTS[name](output, tmp_path / "a")
    assert of_path == OUTPUTS[name](str(output), tmp_path / "b")


@pytest.mark.parametrize("name", OUTPUTS)
def test_malformed_locations_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(gc2ray.ConfigError, match=r"OUTPUT: .*did you mean 's3://bucket/x'"):
        OUTPUTS[name]("s3:/bucket/x", tmp_path)
    with pytest.raises(gc2ray.ConfigError, match="OUTPUT: '' is neither a path nor a URL"):
        OUTPUTS[name]("", tmp_path)


def test_a_path_is_drawn_from_and_written_to(output: Path, tmp_path: Path) -> None:
    with pytest.raises(gc2ray.ConfigError, match="no row 'x' in the plan"):
        gc2ray.show(output, "x", tmp_path / "tokens.png")
    with pytest.raises(gc2ray.ConfigError, match=r"DESTINATION: .*did you mean"):
        gc2ray.compact(output, "s3:/bucket/x")
    with pytest.raises(gc2ray.ConfigError, match=r"--to: .*did you mean"):
        gc2ray.report(output, to="s3:/bucket/x")
    with pytest.raises(gc2ray.ConfigError, match=r"--like: .*did you mean"):
        gc2ray.estimate(make_job("model"), like="s3:/bucket/x")


@pytest.mark.parametrize(("message", "call"), OUT_OF_RANGE)
def test_arguments_out_of_range_are_refused(
    output: Path, message: str, call: Callable[[Any, str], object]
) -> None:
    """In the words of the argument, before a model is loaded or a file is written."""
    before = sorted(output.rglob("*"))
    with pytest.raises(gc2ray.ConfigError, match=message):
        call(make_job("model"), str(output))
    assert sorted(output.rglob("*")) == before


def test_one_value_stands_for_a_list_of_one(output: Path) -> None:
    assert gc2ray.read_answers(output, "answer").column_names == ["answer"]
    evaluation = gc2ray.evaluate(output, reference="source", metrics="contains")
    assert evaluation.metrics == ("contains",)
    assert gc2ray.retry(output, statuses="dead").retry_round is None
    assert (as_tuple(0.5), as_tuple(["a", "b"])) == ((0.5,), ("a", "b"))


def test_a_range_has_its_ends_in_it() -> None:
    check_range("x", None, 1)
    check_range("x", 1, 1)
    check_range("x", 1, 0, 1)
    with pytest.raises(gc2ray.ConfigError, match=r"x: expected a number, 0 to 1; got 1.5"):
        check_range("x", 1.5, 0, 1)

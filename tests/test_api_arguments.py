"""Arguments of the Python API: locations, single values for lists, numbers out of range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gc2ray
from gc2ray.core.arguments import as_tuple, check_count, check_range
from gc2ray.core.config.job import Cluster
from gc2ray.core.errors import Status
from gc2ray.core.metrics.scores import METRICS
from gc2ray.core.stats import RunStats
from gc2ray.output.planner import Judged, Outcome
from gc2ray.output.retry import Retried, Retry
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
    ("price: .*did you mean 'spot'", lambda _, out: gc2ray.report(out, price="spott")),
    (
        "lists: .*did you mean 'each'",
        lambda _, out: gc2ray.evaluate(out, reference="x", lists="eac"),
    ),
    ("rows: expected a whole number", lambda job, _: gc2ray.tune(job, rows=None)),
    ("rows: expected a whole number.* got '3'", lambda job, _: gc2ray.check(job, rows="3")),
    ("show: expected a whole number.* got 1.5", lambda _, out: gc2ray.report(out, show=1.5)),
    ("svg: '/no/x.svg' cannot be written", lambda job, _: gc2ray.tune(job, svg="/no/x.svg")),
    ("svg: '' cannot be written", lambda job, _: gc2ray.tune(job, svg="")),
    ("--like: '' is neither", lambda job, _: gc2ray.estimate(job, like="")),
    ("--to: .* lies inside", lambda _, out: gc2ray.report(out, to=f"{out}/data")),
    ("lies inside", lambda _, out: gc2ray.compact(out, f"{out}/../{Path(out).name}/x")),
    ("price: .*known: on_demand, spot", lambda _, out: gc2ray.report(out, price="cheap")),
    ("no row 'in.parquet#0'", lambda _, out: gc2ray.report(out, rows="in.parquet#0")),
    ("file_bytes: .* at least 1", lambda _, out: gc2ray.compact(out, f"{out}-c", file_bytes=0)),
    ("OUTPUT: name at least one", lambda _, out: gc2ray.report()),
    ("OUTPUT: name at least one", lambda _, out: gc2ray.evaluate(reference="source")),
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


def test_locations_to_write_to_are_checked(output: Path, tmp_path: Path) -> None:
    with pytest.raises(gc2ray.ConfigError, match="no row 'x' in the plan"):
        gc2ray.show(output, "x", tmp_path / "tokens.png")
    with pytest.raises(gc2ray.ConfigError, match=r"DESTINATION: .*did you mean"):
        gc2ray.compact(output, "s3:/bucket/x")
    with pytest.raises(gc2ray.ConfigError, match=r"--to: .*did you mean"):
        gc2ray.report(output, to="s3:/bucket/x")
    with pytest.raises(gc2ray.ConfigError, match=r"--like: .*did you mean"):
        gc2ray.estimate(make_job("model"), like="s3:/bucket/x")


@pytest.mark.parametrize(("message", "call"), OUT_OF_RANGE)
def test_arguments_that_cannot_be_used_are_refused(
    output: Path, message: str, call: Callable[[Any, str], object]
) -> None:
    """Before a model is loaded or a file is written."""
    before = sorted(output.rglob("*"))
    with pytest.raises(gc2ray.ConfigError, match=message):
        call(make_job("model"), str(output))
    assert sorted(output.rglob("*")) == before


def test_one_value_stands_for_a_list_of_one(output: Path) -> None:
    assert gc2ray.read_answers(output, "answer").column_names == ["answer"]
    assert gc2ray.read_answers(output, []).num_columns == gc2ray.read_answers(output).num_columns
    assert gc2ray.evaluate(output, reference="source", metrics=None).metrics == tuple(METRICS)  # type: ignore[arg-type]
    evaluation = gc2ray.evaluate(output, reference="source", metrics="contains")
    assert evaluation.metrics == ("contains",)
    assert gc2ray.retry(output, statuses="dead").retry_round is None
    assert (as_tuple(0.5), as_tuple(["a", "b"])) == ((0.5,), ("a", "b"))


@pytest.mark.parametrize("name", ["run", "estimate", "tune", "check", "submit"])
def test_a_file_is_no_job(name: str) -> None:
    with pytest.raises(TypeError, match=r"'job\.yaml' is no Job: gc2ray.load_job reads one"):
        getattr(gc2ray, name)("job.yaml", **({"address": "http://x"} if name == "submit" else {}))


def test_overrides_are_text(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("output: out")
    calls: list[Callable[[], object]] = [
        lambda: gc2ray.load_job(tmp_path / "job.yaml", ["a.b=c"]),  # type: ignore[arg-type]
        lambda: gc2ray.load_model(tmp_path, {"a": 1}),  # type: ignore[arg-type]
        lambda: gc2ray.retry(tmp_path, ["cluster.workers=1"]),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(gc2ray.ConfigError, match=r"a\.b=c|only cluster"):
            call()


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").touch()
    with pytest.raises(
        gc2ray.ConfigError, match=r"job\.yaml is a file, not the directory of a run"
    ):
        gc2ray.status(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("statuses", "rows"), [((), [(0, 1), (4, 5)]), ("failed", [(0, 1)]), (["bad_image"], [(4, 5)])]
)
def test_a_retry_answers_the_rows_that_it_was_called_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: Any, rows: list[tuple[int, int]]
) -> None:
    def outcome(source: str, row: int) -> list[Status]:
        failures = {0: Status.FAILED, 4: Status.BAD_IMAGE}
        return [failures.get(row, Status.OK) if source == "a.parquet" else Status.OK]

    def answered(retry: Retry, cluster: Cluster, **_: object) -> Retried:
        assert cluster.max_bad_rows == 0.5
        spans.extend((span.first, span.stop) for shard in retry.plan.shards for span in shard.spans)
        judged = Judged(17, 0, 0.5)
        return Retried(retry.number, Outcome(1, 1, 1, 1, RunStats(), judged=judged), judged)

    spans: list[tuple[int, int]] = []
    monkeypatch.setattr("gc2ray.runner.run.run_retry", answered)
    write_round(tmp_path, 0, first_plan(), outcome)
    retried = gc2ray.retry(tmp_path, "cluster.max_bad_rows=0.5", statuses=statuses)
    assert (retried.retry_round, retried.judged.answers, retried.exit_code) == (1, 17, 0)
    assert sorted(spans) == rows


def test_numbers_of_numpy_are_numbers() -> None:
    """Those of a pandas column, say, are no `int` and, but for one, no `float`."""
    assert as_tuple(np.float32(0.5)) == (0.5,)
    check_range("x", np.float32(0.5), 0, 1)
    check_count("x", np.int64(5), 1)
    with pytest.raises(gc2ray.ConfigError, match="x: expected a whole number"):
        check_count("x", np.float64(5), 1)


def test_a_range_has_its_ends_in_it() -> None:
    check_range("x", 1, 1)
    check_range("x", 1, 0, 1)
    with pytest.raises(gc2ray.ConfigError, match=r"x: expected a number, 0 to 1; got 1.5"):
        check_range("x", 1.5, 0, 1)

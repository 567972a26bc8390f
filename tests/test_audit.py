"""A second look: which rows get one, what it says, and that it changes nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gc2ray.audit import Audited, is_audited
from gc2ray.config import Cluster, Job, parse_recipe
from gc2ray.engine import Engine
from gc2ray.errors import BadRow, ConfigError, Status
from gc2ray.families.family import Loaded
from gc2ray.handout import Handout
from gc2ray.records import RECIPES_WAY, UNCOMPRESSED, Answer, Request, stats_of
from gc2ray.store import Store
from gc2ray.verify import verify
from gc2ray.worker import Worker
from tests.fakes import EchoEngine, echo
from tests.rows import make_job, make_recipe, request, requests

STAGES = {"encode": 5, "generate": 7}


class TwoFaced(EchoEngine):
    """Says one thing compressed and another uncompressed; answers in any order."""

    def __init__(self, compressed: str | None, whole: str | None, seed: int = 0) -> None:
        super().__init__()
        self._says = {False: compressed, True: whole}
        self._order = random.Random(seed)

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        asked = list(requests)
        self._order.shuffle(asked)
        for row in asked:
            if row.fault is not None:
                yield echo(row, status=row.fault.status, answer=None, error=row.fault.message)
                continue
            says = self._says[row.way == UNCOMPRESSED]
            status = Status.OK if says is not None else Status.TOO_LONG
            times = {
                stage: ns * (1 + 9 * (row.way == UNCOMPRESSED)) for stage, ns in STAGES.items()
            }
            yield echo(row, status=status, answer=says, stage_ns=times)


def rows(count: int = 40) -> list[Request]:
    return [request(seed=number) for number in range(count)]


def test_which_rows_are_audited_depends_on_their_keys_alone() -> None:
    keys = [f"a.parquet#{number}" for number in range(20_000)]
    few = {key for key in keys if is_audited(key, 0.01)}
    more = {key for key in keys if is_audited(key, 0.1)}
    assert 150 < len(few) < 250
    assert 1800 < len(more) < 2200
    assert few < more
    assert all(is_audited(key, 1.0) for key in keys)
    assert not any(is_audited(key, 0.0) for key in keys)


@pytest.mark.parametrize("seed", range(5))
def test_every_request_has_one_answer(seed: int) -> None:
    fault = BadRow(Status.BAD_PROMPT, "no prompt")
    asked = [replace(row, fault=fault) if row.row % 7 == 3 else row for row in rows()]
    found = list(Audited(TwoFaced("a cat", "a cat.", seed), 0.5).stream(asked))
    assert sorted(answer.request.row for answer in found) == list(range(40))
    for answer in found:
        looked = answer.request.fault is None and is_audited(answer.request.row_key, 0.5)
        assert (answer.audit is not None) == looked
        assert answer.request.way == RECIPES_WAY
        if answer.request.fault is None:
            assert (answer.answer, answer.stage_ns) == ("a cat", STAGES)
    assert 5 < sum(answer.audit is not None for answer in found) < 35


@pytest.mark.parametrize(
    ("compressed", "whole", "agreement"),
    [
        ("a cat", "A cat.", 1.0), ("a cat", "a car", 0.8), ("yes", "no", 0.0),
        (None, "a cat", 0.0), ("a cat", None, 0.0), (None, None, None), ("", "", 1.0),
    ],
)  # fmt: skip
def test_agreement_is_how_alike_both_answers_are(
    compressed: str | None, whole: str | None, agreement: float | None
) -> None:
    found = list(Audited(TwoFaced(compressed, whole), 1.0).stream(rows(6)))
    for answer in found:
        assert answer.audit is not None
        assert answer.audit.answer == whole
        assert answer.audit.retention == 1.0
        assert answer.audit.agreement == agreement
        assert answer.status == (Status.OK if compressed is not None else Status.TOO_LONG)
    stats = stats_of(found)
    known = 0 if agreement is None else 6
    assert (stats.audits, stats.audits_agreed) == (known, known if agreement == 1 else 0)
    assert stats.agreement_millionths == round((agreement or 0) * 1e6) * known
    assert len(stats.least_agreed) == (known if agreement != 1 else 0)
    assert stats.stage_ns["generate"] == 6 * 7
    assert stats.audit_ns == {"encode": 300, "generate": 420}
    assert stats.audited_ns == {"encode": 30, "generate": 42}


def test_a_storage_that_failed_the_second_look_has_the_shard_tried_again() -> None:
    class Failing(TwoFaced):
        def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
            for answer in super().stream(requests):
                yield replace(answer, retry=answer.request.way == UNCOMPRESSED)

    found = list(Audited(Failing("a", "a"), 0.5).stream(rows()))
    assert all(answer.retry == (answer.audit is not None) for answer in found)


def test_it_is_otherwise_the_engine_within() -> None:
    engine = EchoEngine()
    audited = Audited(engine, 0.1)
    assert (audited.device, audited.model_digest) == (engine.device, engine.model_digest)
    assert audited.model_shape is None
    audited.forget()
    assert engine.forgot == 1
    assert audited.totals() == engine.totals()


def test_a_second_look_changes_no_answer(loaded_models: dict[str, Loaded]) -> None:
    """And says what an engine says that compresses nothing."""
    loaded = loaded_models["vicuna"]

    def engine(**changes: object) -> Engine:
        recipe = make_recipe("unused", generation__max_new_tokens=6, **changes)
        return Engine(loaded, recipe, Cluster())

    def by_row(found: Iterable[Answer]) -> dict[int, Answer]:
        return {answer.request.row: answer for answer in found}

    plain = by_row(engine(compression__retention=0.1).stream(requests()))
    whole = by_row(engine(compression__method="none").stream(requests()))
    audited = by_row(Audited(engine(compression__retention=0.1), 1.0).stream(requests()))
    assert plain.keys() == audited.keys()
    for row, answer in audited.items():
        assert answer.token_ids == plain[row].token_ids
        assert answer.kept_per_view == plain[row].kept_per_view
        assert (answer.method, answer.retention_requested) == ("globalcom2", 0.1)
        assert answer.demand == plain[row].demand
        assert answer.audit is not None
        assert answer.audit.answer == whole[row].answer
        assert answer.audit.stage_ns["encode"] > 0
        assert plain[row].kept_mask is None


def test_the_mask_names_the_tokens_that_were_kept(loaded_models: dict[str, Loaded]) -> None:
    recipe = make_recipe("unused", compression__retention=0.25)
    engine = Audited(Engine(loaded_models["vicuna"], recipe, Cluster()), 1.0)
    for answer in engine.stream(requests()):
        assert answer.kept_mask is not None
        assert answer.kept_per_view is not None
        bits = [
            np.unpackbits(np.frombuffer(view, np.uint8), bitorder="little")[:36]
            for view in answer.kept_mask
        ]
        assert [int(view.sum()) for view in bits] == list(answer.kept_per_view[0])


def test_a_worker_writes_down_what_it_saw(tmp_path: Path, tiny_paths: dict[str, Path]) -> None:
    from gc2ray.manifest import Plan
    from gc2ray.planner import store_plan
    from gc2ray.sources.source import Source
    from tests.rows import write_rows

    source = write_rows(tmp_path / "in" / "a.parquet", 12)
    job: Job = make_job(tiny_paths["vicuna"], source, tmp_path / "out", audit__share=0.5).located()
    files, carried = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, 12, carried))
    worker = Worker(job, carried)
    worker.load()
    done = worker.process(Handout(plan.shards[0]))
    expected = {f"a.parquet#{row}" for row in range(12) if is_audited(f"a.parquet#{row}", 0.5)}
    assert 0 < len(expected) < 12
    assert done.stats.audits == len(expected)
    table = pq.read_table(Path(job.output) / plan.shards[0].part_name).to_pylist()
    assert {row["row_key"] for row in table if row["audit"]} == expected
    for row in table:
        assert (row["kept_mask"] is not None) == (row["audit"] is not None)
        if row["audit"]:
            assert row["audit"]["retention"] == 1.0
            assert 0 <= row["audit"]["agreement"] <= 1
    assert verify(job.output, deep=True).exit_code == 0


@pytest.mark.parametrize("compression", [{"method": "none"}, {"retention": 1.0}])
def test_nothing_to_audit_is_refused(compression: dict[str, object]) -> None:
    recipe = make_recipe("model").model_dump(mode="json")
    data = recipe | {"compression": compression, "audit": {"share": 0.01}}
    with pytest.raises(ConfigError, match="nothing is compressed; set it to 0"):
        parse_recipe(data)
    assert parse_recipe(data | {"audit": {"share": 0.0}}).audit.share == 0


def test_without_an_audit_a_recipe_is_what_it_was() -> None:
    """Outputs from before go on: a setting at its default is not in the fingerprint."""
    recipe = make_recipe("model")
    assert recipe.model_copy(update={"audit": recipe.audit}).fingerprint() == recipe.fingerprint()
    assert '"audit"' not in recipe.model_dump_json(exclude_defaults=True)

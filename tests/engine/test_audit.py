"""A second look: which rows get one, what it says, and that it changes nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gc2ray.core.config.job import Cluster, Job
from gc2ray.core.config.recipe import parse_recipe
from gc2ray.core.errors import BadRow, ConfigError, Status
from gc2ray.core.records import RECIPES_POLICY, UNCOMPRESSED, Answer, Request
from gc2ray.core.schema import stats_of
from gc2ray.data.store import Store
from gc2ray.engine.audit import AuditedEngine, is_audited
from gc2ray.engine.engine import Engine
from gc2ray.models.adapter import LoadedModel
from gc2ray.output.verify import verify
from gc2ray.runner.messages import ShardAssignment
from gc2ray.runner.worker import Worker
from tests.support.fakes import EchoEngine, echo
from tests.support.rows import make_job, make_recipe, request, requests

STAGES = {"encode": 5, "generate": 7}
STEPS = ("retention 0.5", "retention 0.75")
RETENTIONS = {RECIPES_POLICY: 0.25, STEPS[0]: 0.5, STEPS[1]: 0.75, UNCOMPRESSED: 1.0}
TIMES = {RECIPES_POLICY: 1, STEPS[0]: 2, STEPS[1]: 3, UNCOMPRESSED: 10}


class PolicyEngine(EchoEngine):
    """Answers differently for each policy, in its own time; answers in any order."""

    def __init__(self, says: Mapping[str, str | None], seed: int = 0) -> None:
        super().__init__()
        self._says = says
        self._order = random.Random(seed)
        self._waiting: list[Request] = []
        self.policies: list[str] = []

    def requeue(self, request: Request) -> None:
        self._waiting.append(request)

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        self._waiting += requests
        while self._waiting:
            yield self.answer_for(self._waiting.pop(self._order.randrange(len(self._waiting))))

    def answer_for(self, row: Request) -> Answer:
        if row.fault is not None:
            return echo(row, status=row.fault.status, answer=None, error=row.fault.message)
        self.policies.append(row.policy)
        says = self._says[row.policy]
        return echo(
            row,
            status=Status.OK if says is not None else Status.TOO_LONG,
            answer=says,
            stage_ns={stage: ns * TIMES[row.policy] for stage, ns in STAGES.items()},
            retention_requested=RETENTIONS[row.policy],
        )


def engine_with_answers(compressed: str | None, whole: str | None, seed: int = 0) -> PolicyEngine:
    return PolicyEngine({RECIPES_POLICY: compressed, UNCOMPRESSED: whole}, seed)


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
    found = list(AuditedEngine(engine_with_answers("a cat", "a cat.", seed), 0.5).stream(asked))
    assert sorted(answer.request.row for answer in found) == list(range(40))
    for answer in found:
        audited = answer.request.fault is None and is_audited(answer.request.row_key, 0.5)
        assert (answer.audit is not None) == audited
        assert answer.request.policy == RECIPES_POLICY
        if answer.request.fault is None:
            assert (answer.answer, answer.stage_ns) == ("a cat", STAGES)
    assert 5 < sum(answer.audit is not None for answer in found) < 35


@pytest.mark.parametrize(
    ("compressed", "whole", "similarity"),
    [
        ("a cat", "A cat.", 1.0), ("a cat", "a car", 0.8), ("yes", "no", 0.0),
        (None, "a cat", 0.0), ("a cat", None, None), (None, None, None), ("", "", 1.0),
    ],
)  # fmt: skip
def test_similarity_compares_both_answers(
    compressed: str | None, whole: str | None, similarity: float | None
) -> None:
    found = list(AuditedEngine(engine_with_answers(compressed, whole), 1.0).stream(rows(6)))
    for answer in found:
        assert answer.audit is not None
        assert answer.audit.answer == whole
        assert answer.audit.retention == 1.0
        assert answer.audit.similarity == similarity
        assert answer.status == (Status.OK if compressed is not None else Status.TOO_LONG)
    stats = stats_of(found)
    known = 0 if similarity is None else 6
    assert (stats.audits, stats.audits_agreed) == (known, known if similarity == 1 else 0)
    assert stats.similarity_millionths == round((similarity or 0) * 1e6) * known
    assert len(stats.least_similar) == (known if similarity != 1 else 0)
    assert stats.stage_ns["generate"] == 6 * 7
    assert stats.audit_uncompressed_ns == {"encode": 300, "generate": 420}
    assert stats.audit_compressed_ns == {"encode": 30, "generate": 42}


def test_a_storage_error_in_an_audit_is_retryable() -> None:
    class Failing(PolicyEngine):
        failing = UNCOMPRESSED

        def answer_for(self, row: Request) -> Answer:
            return replace(super().answer_for(row), is_retryable=row.policy == self.failing)

    for failing in (UNCOMPRESSED, STEPS[0]):
        engine = Failing({RECIPES_POLICY: "a", STEPS[0]: "b", UNCOMPRESSED: "c"})
        engine.failing = failing
        found = list(AuditedEngine(engine, 0.5, STEPS[:1]).stream(rows()))
        assert all(answer.is_retryable == (answer.audit is not None) for answer in found)
        assert 5 < sum(answer.is_retryable for answer in found) < 35


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("first", "half", "more", "whole", "answer", "retention", "now", "extra"),
    [
        ("cat", "dog", "cow", "Cat.", "cat", 0.25, None, 0),  # agreed at once
        ("no", "yes", "no", "yes", "yes", 0.5, 1.0, 1),
        ("no", "on", "yes", "yes", "yes", 0.75, 1.0, 3),
        ("no", "on", "yet", "yes", "yet", 0.75, 2 / 3, 3),  # none agreed
        ("no", None, "yes", "yes", "yes", 0.75, 1.0, 3),
        ("no", "on", None, "yes", "on", 0.5, 0.0, 4),  # what failed is no answer
        (None, "yes", "no", "yes", "yes", 0.5, 1.0, 1),
        ("no", None, None, "yes", "no", 0.25, 0.0, 5),
        ("no", "yes", "yes", None, "no", 0.25, None, 0),  # nothing to agree with
        (None, "yes", "yes", None, None, 0.25, None, 0),
    ],
)
def test_a_row_that_disagrees_is_answered_again_step_by_step(
    first: str | None,
    half: str | None,
    more: str | None,
    whole: str | None,
    answer: str | None,
    retention: float,
    now: float | None,
    extra: int,
    seed: int,
) -> None:
    """`extra`: the time of what was replaced."""
    says = {RECIPES_POLICY: first, STEPS[0]: half, STEPS[1]: more, UNCOMPRESSED: whole}
    found = list(AuditedEngine(PolicyEngine(says, seed), 1.0, STEPS).stream(rows(4)))
    assert sorted(row.request.row for row in found) == [0, 1, 2, 3]
    for row in found:
        assert (row.answer, row.retention_requested) == (answer, retention)
        assert row.audit is not None
        assert (row.audit.answer, row.audit.stage_ns["encode"]) == (whole, 50)
        assert row.audit.own_ns == STAGES
        escalation = row.audit.escalation
        assert (escalation is None) == (now is None)
        if escalation is not None:
            assert (escalation.first_answer, escalation.similarity) == (first, pytest.approx(now))
            assert escalation.stage_ns.get("encode", 0) == 5 * extra
    stats = stats_of(found)
    assert stats.escalated == ({} if now is None else {f"{retention:g}": 4})
    assert stats.escalated_agreed == ({f"{retention:g}": 4} if now == 1 else {})
    assert stats.escalation_ns.get("generate", 0) == 4 * 7 * extra
    assert stats.audit_compressed_ns == {"encode": 20, "generate": 28}
    assert stats.audits_agreed == (4 if first == "cat" else 0), "what the recipe's way says"


def test_answers_that_are_alike_enough_agree() -> None:
    says = {RECIPES_POLICY: "a cat", STEPS[0]: "a car", UNCOMPRESSED: "a car"}
    for min_similarity, escalates in ((0.8, False), (0.81, True)):
        engine = PolicyEngine(says)
        found = list(AuditedEngine(engine, 1.0, STEPS[:1], min_similarity).stream(rows(5)))
        assert {answer.answer for answer in found} == {"a car" if escalates else "a cat"}
        assert (STEPS[0] in engine.policies) == escalates
        assert {a.audit.similarity for a in found if a.audit} == {0.8}, "the recipe's own"


def test_only_audited_rows_are_answered_again() -> None:
    says = {RECIPES_POLICY: "no", STEPS[0]: "yes", UNCOMPRESSED: "yes"}
    found = list(AuditedEngine(PolicyEngine(says), 0.5, STEPS[:1]).stream(rows()))
    assert {(a.answer, a.audit is not None) for a in found} == {("yes", True), ("no", False)}


def test_other_attributes_are_those_of_the_wrapped_engine() -> None:
    engine = EchoEngine()
    audited = AuditedEngine(engine, 0.1)
    assert (audited.device, audited.model_digest) == (engine.device, engine.model_digest)
    assert audited.model_shape is None
    audited.clear_cache()
    assert engine.cache_clears == 1
    assert audited.totals() == engine.totals()


def an_engine(loaded: LoadedModel, **changes: object) -> Engine:
    recipe = make_recipe("unused", generation__max_new_tokens=6, **changes)
    return Engine(loaded, recipe, Cluster())


def by_row(found: Iterable[Answer]) -> dict[int, Answer]:
    return {answer.request.row: answer for answer in found}


def test_an_audit_changes_no_answer(loaded_models: dict[str, LoadedModel]) -> None:
    """And says what an engine says that compresses nothing."""
    engine = partial(an_engine, loaded_models["vicuna"])
    plain = by_row(engine(compression__retention=0.1).stream(requests()))
    whole = by_row(engine(compression__method="none").stream(requests()))
    audited = by_row(AuditedEngine(engine(compression__retention=0.1), 1.0).stream(requests()))
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


def test_an_escalated_answer_is_that_of_the_higher_retention(
    loaded_models: dict[str, LoadedModel],
) -> None:
    """Token by token; the rows that agree keep what the recipe's retention said."""
    engine = partial(an_engine, loaded_models["vicuna"])
    at = {r: by_row(engine(compression__retention=r).stream(requests())) for r in (0.1, 0.3, 0.6)}
    audit = {"share": 1.0, "escalate": [0.3, 0.6]}
    recipe = parse_recipe(
        make_recipe("unused", generation__max_new_tokens=6, compression__retention=0.1).model_dump()
        | {"audit": audit}
    )
    engine = AuditedEngine(
        Engine(loaded_models["vicuna"], recipe, Cluster()), 1.0, tuple(recipe.escalation_steps())
    )
    found = by_row(engine.stream(requests()))
    assert found.keys() == at[0.1].keys()
    for row, answer in found.items():
        assert answer.token_ids == at[answer.retention_requested][row].token_ids
        assert answer.kept_per_view == at[answer.retention_requested][row].kept_per_view
        assert answer.audit is not None
        first, escalation = at[0.1][row], answer.audit.escalation
        assert (escalation is None) == (answer.audit.similarity == 1)
        if escalation is not None:
            assert escalation.first_answer == first.answer
            assert (escalation.similarity == 1) or answer.retention_requested == 0.6
    assert any(answer.retention_requested > 0.1 for answer in found.values())


def test_a_request_requeued_at_the_end_is_answered(
    loaded_models: dict[str, LoadedModel],
) -> None:
    engine = Engine(loaded_models["vicuna"], make_recipe("unused"), Cluster())
    with pytest.raises(RuntimeError, match="needs a running stream"):
        engine.requeue(request())
    bad = replace(request(seed=1), images=())
    found = []
    for answer in engine.stream([bad, request(seed=2)]):
        found.append(answer)
        if len(found) < 5:  # after the last one, too
            engine.requeue(replace(request(seed=2 + len(found)), policy=UNCOMPRESSED))
    assert sorted(answer.request.row for answer in found) == [1, 2, 3, 4, 5, 6]
    assert {a.method for a in found if a.request.row > 2} == {"none"}


def test_the_mask_names_the_tokens_that_were_kept(loaded_models: dict[str, LoadedModel]) -> None:
    recipe = make_recipe("unused", compression__retention=0.25)
    engine = AuditedEngine(Engine(loaded_models["vicuna"], recipe, Cluster()), 1.0)
    for answer in engine.stream(requests()):
        assert answer.kept_mask is not None
        assert answer.kept_per_view is not None
        bits = [
            np.unpackbits(np.frombuffer(view, np.uint8), bitorder="little")[:36]
            for view in answer.kept_mask
        ]
        assert [int(view.sum()) for view in bits] == list(answer.kept_per_view[0])


@pytest.mark.parametrize("escalate", [[], [0.5, 0.75]])
def test_a_worker_writes_audits_to_the_part(
    tmp_path: Path, tiny_paths: dict[str, Path], escalate: list[float]
) -> None:
    from gc2ray.data.source import Source
    from gc2ray.output.plan import Plan
    from gc2ray.output.planner import store_plan
    from tests.support.rows import write_rows

    source = write_rows(tmp_path / "in" / "a.parquet", 12)
    asked = {"audit__share": 0.5, "audit__escalate": escalate}
    job: Job = make_job(tiny_paths["vicuna"], source, tmp_path / "out", **asked).located()
    files, kept_columns = Source(job.recipe.input).scan()
    plan = store_plan(Store(job.output), job, Plan.cut(job.recipe, files, 12, kept_columns))
    worker = Worker(job, kept_columns)
    worker.load()
    done = worker.process(ShardAssignment(plan.shards[0]))
    expected = {f"a.parquet#{row}" for row in range(12) if is_audited(f"a.parquet#{row}", 0.5)}
    assert 0 < len(expected) < 12
    assert done.stats.audits == len(expected)
    table = pq.read_table(Path(job.output) / plan.shards[0].part_name).to_pylist()
    assert {row["row_key"] for row in table if row["audit"]} == expected
    for row in table:
        assert (row["kept_mask"] is not None) == (row["audit"] is not None)
        if row["audit"]:
            assert row["audit"]["retention"] == 1.0
            assert 0 <= row["audit"]["similarity"] <= 1
            escalated = bool(escalate) and row["audit"]["similarity"] < 1
            assert (row["audit"]["final_similarity"] is not None) == escalated
            assert (row["audit"]["first_answer"] is not None) == escalated
            assert (row["retention_requested"] > 0.25) == escalated
    assert bool(done.stats.escalated) == bool(escalate)
    assert verify(job.output, deep=True).exit_code == 0


@pytest.mark.parametrize("compression", [{"method": "none"}, {"retention": 1.0}])
def test_nothing_to_audit_is_refused(compression: dict[str, object]) -> None:
    recipe = make_recipe("model").model_dump(mode="json")
    data = recipe | {"compression": compression, "audit": {"share": 0.01}}
    with pytest.raises(ConfigError, match="nothing is compressed; set it to 0"):
        parse_recipe(data)
    assert parse_recipe(data | {"audit": {"share": 0.0}}).audit.share == 0


@pytest.mark.parametrize(
    ("audit", "compression", "said"),
    [
        ({"share": 0.1, "escalate": [0.75, 0.5]}, {}, "escalate: retentions must rise"),
        ({"share": 0.1, "escalate": [0.5, 0.5]}, {}, "escalate: retentions must rise"),
        ({"escalate": [0.5]}, {}, "escalate needs a share above 0"),
        ({"share": 0.1, "escalate": [1.0]}, {}, "less than 1"),
        (
            {"share": 0.1, "escalate": [0.2]}, {"retention": 0.25},
            "escalate: 0.2 is not above the retention of the compression, 0.25",
        ),
        (
            {"share": 0.1, "escalate": [0.5]}, {"method": "thumbnail"},
            "escalate: thumbnail has no retention to raise",
        ),
    ],
)  # fmt: skip
def test_nothing_to_escalate_is_refused(
    audit: dict[str, object], compression: dict[str, object], said: str
) -> None:
    recipe = make_recipe("model").model_dump(mode="json")
    with pytest.raises(ConfigError, match=said):
        parse_recipe(recipe | {"compression": compression, "audit": audit})


def test_without_an_audit_a_recipe_is_what_it_was() -> None:
    """Outputs from before go on: a setting at its default is not in the fingerprint."""
    recipe = make_recipe("model")
    assert recipe.model_copy(update={"audit": recipe.audit}).fingerprint() == recipe.fingerprint()
    assert '"audit"' not in recipe.model_dump_json(exclude_defaults=True)

"""Outputs made by hand: any rounds, any answers, real parts."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gc2ray.core.config.job import Job
from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.schema import Provenance, stats_of
from gc2ray.core.shards import Shard, SourceFile, Span, cut_shards, cut_spans, row_key
from gc2ray.core.shards import Shards as ShardColumns
from gc2ray.core.stats import STAGES, RunStats
from gc2ray.data.store import Store
from gc2ray.output.parts import PartFooter, commit_part, part_bytes
from gc2ray.output.plan import Plan
from gc2ray.output.planner import store_plan
from gc2ray.output.run_directory import round_store
from tests.support.rows import make_recipe

RECIPE = make_recipe("model")
KEPT_COLUMNS = pa.schema([pa.field("id", pa.int64()), pa.field("tag", pa.list_(pa.string()))])
FILES = (SourceFile("a.parquet", "fa", (5, 5)), SourceFile("d/b.parquet", "fb", (7,)))

WRITTEN = datetime(2026, 11, 1, tzinfo=UTC)
"""When the first part was; the others follow by the minute."""

Outcome = Callable[[str, int], Sequence[Status] | None]
"""What becomes of a row of a source: of each of its prompts; None: it is not answered."""


def all_ok(source: str, row: int) -> list[Status]:
    return [Status.OK]


def first_plan(files: Sequence[SourceFile] = FILES, shard_rows: int = 3) -> Plan:
    shards = cut_shards(files, shard_rows, RECIPE.fingerprint())
    return Plan(RECIPE.fingerprint(), ShardColumns.from_shards(shards), KEPT_COLUMNS)


def retry_of(spans: Iterable[Span], shard_rows: int = 3) -> Plan:
    shards = cut_spans(spans, shard_rows, RECIPE.fingerprint())
    return Plan(RECIPE.fingerprint(), ShardColumns.from_shards(shards), KEPT_COLUMNS)


def an_answer(
    source: str, row: int, prompt: int | None, status: Status, retry_round: int = 0
) -> Answer:
    """Measured numbers differ between answers; a failed one has few."""
    index = prompt or 0
    request = Request(
        row_key=row_key(source, row, prompt),
        source=source,
        row=row,
        images=(),
        prompts=(),
        kept_columns={"id": row, "tag": [source, None]},
        prompt_index=index,
    )
    stages = {stage: 100 * row + place for place, stage in enumerate(STAGES)}
    if status != Status.OK:
        return Answer(request, status, "none", 0.5, error=f"bad in {retry_round}", stage_ns=stages)
    return Answer(
        request, status, "none", 0.5,
        answer=f"{source} {row} {index} of {retry_round}",
        prompt_tokens=40 + row, output_tokens=3 + index, visual_tokens_full=20 + row % 3,
        visual_tokens_kept=row % 7, newline_tokens=2, newline_tokens_full=4,
        kept_per_view=((row % 7,),), kv_bytes=1000 - row, kv_bytes_full=2000, stage_ns=stages,
    )  # fmt: skip


def answers_of(
    shard: Shard, outcome: Outcome, retry_round: int, *, listed: bool = False
) -> list[Answer] | None:
    """The answers of a shard; None if one of its rows has none."""
    found = []
    for source, row in shard.row_ids():
        statuses = outcome(source, row)
        if statuses is None:
            return None
        found += [
            an_answer(source, row, index if listed else None, status, retry_round)
            for index, status in enumerate(statuses)
        ]
    return found


def part_of(
    shard: Shard,
    answers: Sequence[Answer],
    retry_round: int = 0,
    kept_columns: pa.Schema = KEPT_COLUMNS,
) -> bytes:
    own = RunStats(input_starved_ns=7, peak_host_bytes=5)
    stats = stats_of(answers) + own
    written = WRITTEN + timedelta(minutes=shard.index)
    footer = PartFooter(shard.sid, RECIPE.fingerprint(), "token", "w", shard.rows, stats, written)
    return part_bytes(answers, kept_columns, Provenance(1, retry_round, "w"), footer)


def write_round(
    output: Path | str,
    number: int,
    plan: Plan,
    outcome: Outcome = all_ok,
    *,
    listed: bool = False,
    changed: Callable[[Answer], Answer] = lambda answer: answer,
) -> Store:
    """A round whose rows come out as told; shards with a row that is not answered are dead."""
    store = round_store(str(output), number)
    store_plan(store, Job(output=store.uri, recipe=RECIPE), plan)
    for shard in plan.shards:
        answers = answers_of(shard, outcome, number, listed=listed)
        if answers is None:
            store.create(f"dead/{shard.sid}.3.json", b'{"reason": "it died"}')
        else:
            part = part_of(shard, list(map(changed, answers)), number, plan.kept_columns)
            commit_part(store, shard, part, "token")
    return store


def rewrite(
    path: Path,
    change: Callable[[pa.Table], pa.Table],
    stats: Callable[[RunStats], RunStats] = lambda stats: stats,
) -> None:
    """Change the rows of a part; and its footer's statistics, as somebody who hides it would."""
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    changed = change(table)
    metadata[b"gc2ray.stats"] = stats(RunStats.from_json(metadata[b"gc2ray.stats"])).to_json()
    sink = io.BytesIO()
    pq.write_table(changed.replace_schema_metadata(metadata), sink)
    path.write_bytes(sink.getvalue())


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    item = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), item, pa.array(values, item.type))


def with_footer(path: Path, changes: Mapping[bytes, bytes]) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **changes}), path)


def parts(output: Path) -> list[Path]:
    return sorted((output / "data").iterdir())


def random_outcome(seed: int, retry_round: int, *, listed: bool, dead: float = 0.1) -> Outcome:
    """Rows come out at random, the same for the same seed; a row has as many prompts every time."""

    def outcome(source: str, row: int) -> list[Status] | None:
        draw = random.Random(f"{seed} {retry_round} {source} {row}")
        if draw.random() < dead:
            return None
        return [
            draw.choice([Status.OK, Status.OK, Status.FAILED, Status.BAD_IMAGE])
            for _ in range(1 + row % 3 if listed else 1)
        ]

    return outcome


def all_answers(output: Path) -> list[dict[str, Any]]:
    """Every answer of every round, in no order that means anything."""
    files = sorted(output.glob("data/*")) + sorted(output.glob("retry_rounds/*/data/*"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def latest_answers(output: Path) -> dict[str, dict[str, Any]]:
    """The latest answer of each row key, in plain loops."""
    latest: dict[str, dict[str, Any]] = {}
    for answer in all_answers(output):
        known = latest.get(answer["row_key"])
        if known is None or _rank(answer) > _rank(known):
            latest[answer["row_key"]] = answer
    return latest


def _rank(answer: Mapping[str, Any]) -> tuple[bool, int]:
    return answer["status"] == "ok", answer["retry_round"]


def flip_a_bit(part: Path) -> None:
    """In the values of a column, where nothing but a checksum tells."""
    column = pq.read_metadata(part).row_group(0).column(0)
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    part.write_bytes(data)

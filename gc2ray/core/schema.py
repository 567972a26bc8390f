"""The one Arrow schema of answer rows, and answers as its tables.

Failed answers have every column too, with nulls where nothing was measured, so all parts have the
same schema. The names of the columns alone, `ANSWER_COLUMNS`, are in `gc2ray.core.records`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gc2ray.core.errors import Status
from gc2ray.core.records import Answer, Audit
from gc2ray.core.stats import STAGES, RunStats, merged, retention_bucket, top

SCHEMA_VERSION, SCHEMA_KEY = 4, "gc2ray.schema_version"
"""Version of the answer columns, and its key in a part's metadata."""
MILLION = 1_000_000
_AUDIT = pa.struct(
    [
        ("answer", pa.string()),
        ("retention", pa.float64()),
        ("similarity", pa.float64()),
        ("first_answer", pa.string()),
        ("final_similarity", pa.float64()),
    ]
)
ANSWER_FIELDS: tuple[pa.Field, ...] = (
    pa.field("row_key", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("row", pa.int64(), nullable=False),
    pa.field("prompt_index", pa.int32(), nullable=False),
    pa.field("answer", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("output_tokens", pa.int32()),
    pa.field("visual_tokens_full", pa.int32()),
    pa.field("visual_tokens_kept", pa.int32()),
    pa.field("newline_tokens", pa.int32()),
    pa.field("newline_tokens_full", pa.int32()),
    pa.field("kept_per_view", pa.list_(pa.list_(pa.int32()))),
    pa.field("method", pa.string(), nullable=False),
    pa.field("retention_requested", pa.float64(), nullable=False),
    pa.field("retention_actual", pa.float64()),
    pa.field("kv_bytes", pa.int64()),
    pa.field("kv_bytes_full", pa.int64()),
    *(pa.field(f"{stage}_ns", pa.int64(), nullable=False) for stage in STAGES),
    pa.field("oom_splits", pa.int32(), nullable=False),
    pa.field("attempt", pa.int32(), nullable=False),
    pa.field("retry_round", pa.int32(), nullable=False),
    pa.field("device", pa.string(), nullable=False),
    pa.field("worker", pa.string(), nullable=False),
    pa.field("audit", _AUDIT),
    pa.field("kept_mask", pa.list_(pa.binary())),
)
_SUMMED = (
    "visual_tokens_full", "visual_tokens_kept", "newline_tokens_full", "newline_tokens",
    "prompt_tokens", "output_tokens", "kv_bytes", "kv_bytes_full",
)  # fmt: skip
_PLAIN = {pa.bool_(), pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.binary()}
"""Types whose columns Arrow builds from single values, and fast."""
UNWRITTEN_STATS = frozenset(
    {
        "view_tokens_full",
        "images",
        "images_shared",
        "prompt_tokens_shared",
        "flops",
        "flops_full",
        "cache_read_bytes",
        "cache_read_bytes_full",
        "decode_steps",
        "energy_millijoules",
        "audit_uncompressed_ns",
        "audit_compressed_ns",
        "escalation_ns",
        "input_starved_ns",
        "oom_splits",
        "peak_device_bytes",
        "peak_host_bytes",
    }
)
"""Statistics in a part's footer that cannot be computed from its rows."""


def stats_of(answers: Sequence[Answer]) -> RunStats:
    """The statistics of a batch of answers; adding them up one by one would be slow."""
    buckets = Counter(answer.retention_bucket for answer in answers)
    del buckets[None]
    demands = [answer.demand for answer in answers if answer.demand is not None]
    full = [answer.demand_full for answer in answers if answer.demand_full is not None]
    audits = [a.audit for a in answers if a.audit is not None]
    cells = [
        (a.request.row_key, a.retention_requested, _audit_cell(a.audit)) for a in answers if a.audit
    ]
    sums: dict[str, Any] = {
        name: sum(getattr(answer, name) or 0 for answer in answers) for name in _SUMMED
    }
    sums |= _audit_stats(cells)
    return RunStats(
        rows=len(answers),
        by_status=dict(Counter(str(answer.status) for answer in answers)),
        empty_answers=sum(_is_empty(answer.status, answer.answer) for answer in answers),
        view_tokens_full=_by_view(answer.full_per_view for answer in answers),
        view_tokens_kept=_by_view(answer.kept_per_view for answer in answers),
        images=sum(answer.images_encoded for answer in answers),
        flops=merged(demand.flops for demand in demands),
        flops_full=merged(demand.flops for demand in full),
        cache_read_bytes=sum(demand.cache_read_bytes for demand in demands),
        cache_read_bytes_full=sum(demand.cache_read_bytes for demand in full),
        **sums,
        audit_uncompressed_ns=merged(audit.stage_ns for audit in audits),
        audit_compressed_ns=merged(audit.own_ns for audit in audits),
        escalation_ns=merged(a.escalation.stage_ns for a in audits if a.escalation is not None),
        images_shared=sum(answer.images_shared for answer in answers),
        prompt_tokens_shared=sum(answer.prompt_tokens_shared for answer in answers),
        stage_ns={
            stage: sum(answer.stage_ns.get(stage, 0) for answer in answers) for stage in STAGES
        },
        retention={str(bucket): count for bucket, count in buckets.items()},
        slowest=top((answer.busy_ns, answer.request.row_key) for answer in answers),
        largest=top((answer.kv_bytes or 0, answer.request.row_key) for answer in answers),
    )


def _is_empty(status: str, answer: str | None) -> bool:
    """Whether an answer is `ok`, but blank."""
    return status == Status.OK and not (answer or "").strip()


def _audit_stats(audits: Sequence[tuple[str, float, Mapping[str, Any]]]) -> dict[str, Any]:
    """Statistics of audits: row key, retention of the answer, and cell of the column `audit`."""
    compared = [
        (key, cell["similarity"]) for key, _, cell in audits if cell["similarity"] is not None
    ]
    escalated = [
        (f"{retention:g}", cell["final_similarity"])
        for _, retention, cell in audits
        if cell["final_similarity"] is not None
    ]
    return {
        "escalated": dict(Counter(retention for retention, _ in escalated)),
        "escalated_agreed": dict(Counter(retention for retention, now in escalated if now == 1)),
        "audits": len(compared),
        "audits_agreed": sum(similarity == 1 for _, similarity in compared),
        "similarity_millionths": sum(round(similarity * MILLION) for _, similarity in compared),
        "least_similar": top(
            (MILLION - round(similarity * MILLION), key)
            for key, similarity in compared
            if similarity < 1
        ),
    }


def _by_view(answers: Iterable[Sequence[Sequence[int | None]] | None]) -> dict[str, int]:
    """Numbers of tokens by view, over all images of answers."""
    total: Counter[int] = Counter()
    for images in answers:
        for views in images or ():
            for view, tokens in enumerate(views):
                total[view] += tokens or 0  # None: an image without a thumbnail
    return {str(view): tokens for view, tokens in sorted(total.items())}


@dataclass(frozen=True)
class Provenance:
    """The columns that are the same for all rows of a part."""

    attempt: int
    retry_round: int
    worker: str


def answer_schema(kept_columns: pa.Schema, metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """The schema of every part: the kept input columns, then the answer columns."""
    head = {SCHEMA_KEY: str(SCHEMA_VERSION), **(metadata or {})}
    return pa.schema([*kept_columns, *ANSWER_FIELDS], metadata=head)


def answer_table(
    answers: Sequence[Answer], kept_columns: pa.Schema, provenance: Provenance
) -> pa.Table:
    """Answer rows as a table with `answer_schema(kept_columns)`, in the order given."""
    columns: dict[str, list[Any]] = {item.name: [] for item in ANSWER_FIELDS}
    for answer in answers:
        row = _answer_row(answer, provenance)
        for name, column in columns.items():
            column.append(row.get(name))
    kept = {
        item.name: _column(
            [answer.request.kept_columns.get(item.name) for answer in answers], item.type
        )
        for item in kept_columns
    }
    return pa.table({**kept, **columns}, schema=answer_schema(kept_columns))


def _column(cells: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Cells as one column, even if they come from files with other types.

    Types that are not plain are built from arrays: Arrow cannot build every type from single
    values, for example lists with nulls.
    """
    if kind in _PLAIN:
        with suppress(pa.ArrowInvalid):  # a cell is of another type
            return pa.array(cells, kind)
    pieces = [pa.nulls(0, kind)]
    for own, run in itertools.groupby(cells, _type_of):
        pieces.append(_piece(list(run), own, kind))
    return pa.concat_arrays(pieces)


def _type_of(cell: Any) -> pa.DataType | None:
    """The type of an Arrow scalar; None for a null or a Python value."""
    return cell.type if isinstance(cell, pa.Scalar) else None


def _piece(cells: Sequence[Any], own: pa.DataType | None, kind: pa.DataType) -> pa.Array:
    """Cells of one type (None: no Arrow scalars) as an array of another type."""
    if own is None:
        nothing = all(cell is None for cell in cells)
        return pa.nulls(len(cells), kind) if nothing else pa.array(cells, kind)
    if pa.types.is_dictionary(own):  # each file has its own, and together they may not fit
        values = pa.concat_arrays([pa.repeat(cell, 1).dictionary_decode() for cell in cells])
        return (values.dictionary_encode() if pa.types.is_dictionary(kind) else values).cast(kind)
    single = [pa.repeat(cell, 1) for cell in cells]
    if own.equals(kind):
        return pa.concat_arrays(single)
    if _has_list_view(own):  # pyarrow 26 casts them to empty lists
        return pa.array([cell.as_py() for cell in cells], kind)
    return pa.concat_arrays([cell.cast(kind) for cell in single])


def _has_list_view(kind: pa.DataType) -> bool:
    """Whether a type is a list view, or contains one."""
    is_one = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return is_one or any(_has_list_view(kind.field(at).type) for at in range(kind.num_fields))


def table_stats(table: pa.Table) -> RunStats:
    """The `stats_of` written answer rows, without `UNWRITTEN_STATS`."""
    stages = {stage: table[f"{stage}_ns"].to_numpy() for stage in STAGES}
    number = {name: pc.fill_null(table[name], 0).to_numpy() for name in _SUMMED}
    full, kept = number["visual_tokens_full"].tolist(), number["visual_tokens_kept"].tolist()
    buckets: Counter[str] = Counter()
    for (kept_tokens, full_tokens), rows in Counter(zip(kept, full, strict=True)).items():
        if full_tokens:
            buckets[f"{retention_bucket(kept_tokens, full_tokens):02d}"] += rows
    keys = table["row_key"].to_pylist()
    sums: dict[str, Any] = {
        name: int(values.sum(dtype=np.int64)) for name, values in number.items()
    }
    cells = (table[name].to_pylist() for name in ("row_key", "retention_requested", "audit"))
    sums |= _audit_stats([row for row in zip(*cells, strict=True) if row[2]])
    return RunStats(
        rows=len(table),
        by_status=dict(Counter(table["status"].to_pylist())),
        empty_answers=sum(map(_is_empty, table["status"].to_pylist(), table["answer"].to_pylist())),
        **sums,
        stage_ns={stage: int(values.sum()) for stage, values in stages.items()},
        view_tokens_kept=_by_view(table["kept_per_view"].to_pylist()),
        retention=dict(buckets),
        slowest=top(zip(sum(stages.values()).tolist(), keys, strict=True)),
        largest=top(zip(number["kv_bytes"].tolist(), keys, strict=True)),
    )


def _answer_row(answer: Answer, provenance: Provenance) -> dict[str, Any]:
    request = answer.request
    direct = (
        "answer", "error", "finish_reason", "prompt_tokens", "output_tokens", "visual_tokens_full",
        "visual_tokens_kept", "newline_tokens", "newline_tokens_full", "kept_per_view", "method",
        "retention_requested", "retention_actual", "kv_bytes", "kv_bytes_full", "device",
        "oom_splits", "kept_mask",
    )  # fmt: skip
    return {
        "row_key": request.row_key,
        "source": request.source,
        "row": request.row,
        "prompt_index": request.prompt_index,
        "status": str(answer.status),
        **{name: getattr(answer, name) for name in direct},
        **{f"{stage}_ns": answer.stage_ns.get(stage, 0) for stage in STAGES},
        "attempt": provenance.attempt,
        "retry_round": provenance.retry_round,
        "worker": provenance.worker,
        "audit": None if answer.audit is None else _audit_cell(answer.audit),
    }


def _audit_cell(audit: Audit) -> dict[str, Any]:
    escalation = audit.escalation
    return {
        "answer": audit.answer,
        "retention": audit.retention,
        "similarity": audit.similarity,
        "first_answer": escalation and escalation.first_answer,
        "final_similarity": escalation and escalation.similarity,
    }

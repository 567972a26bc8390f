"""`RunStats`: statistics of answers, in integers, so that parts add up exactly.

Everything is a count, nanoseconds or bytes; peaks merge by maximum; the lists of slowest and
largest rows are bounded. `a + b` is therefore exact, commutative and associative, and
`RunStats.from_json(s.to_json()) == s`.

Not covered: rates and money. Readers derive them.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

STAGES = ("image", "encode", "compress", "prefill", "generate")
"""Stages of a row: decode and tile the image, vision tower, compression, prefill, generation."""

TOP_ROWS = 10
RETENTION_BUCKETS = 20
"""Fixed buckets of the kept fraction: bucket i counts rows in (i/20, (i+1)/20]."""


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split `total` in proportion to `weights`, in integers that sum to `total` exactly.

    With no weight at all the first share takes everything; no weights give no shares.
    """
    if not weights:
        return []
    whole = sum(weights)
    if whole == 0:
        return [total, *([0] * (len(weights) - 1))]
    edges = [0]
    for weight in weights:
        edges.append(edges[-1] + weight)
    cuts = [total * edge // whole for edge in edges]
    return [after - before for before, after in itertools.pairwise(cuts)]


def retention_bucket(kept: int, full: int) -> int:
    """The bucket of kept / full, in integers so that merging never rounds."""
    if full <= 0:
        return 0
    return min(RETENTION_BUCKETS - 1, max(0, -(-kept * RETENTION_BUCKETS // full) - 1))


def merged(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by key; keys are sorted."""
    total: dict[str, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))


def top(rows: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """The rows with the largest numbers, the largest first; equal numbers are sorted by key."""
    return tuple(heapq.nsmallest(TOP_ROWS, rows, key=lambda row: (-row[0], row[1])))


@dataclass(frozen=True)
class RunStats:
    """Additive statistics of any set of answer rows; rows here are these, not input rows.

    Attributes:
        rows: Answer rows.
        by_status: Rows by status.
        empty_answers: Rows with status `ok` whose answer is blank.
        visual_tokens_full: Visual tokens before compression, newlines not counted.
        visual_tokens_kept: Visual tokens the language model read.
        newline_tokens_full: Newline tokens of the uncompressed sequence.
        newline_tokens: Newline tokens the language model read.
        view_tokens_full: Visual tokens before compression by view: 0 the thumbnail, then crops.
        view_tokens_kept: Visual tokens the language model read, by view.
        images: Images that were decoded and encoded for them.
        images_shared: Images of rows that another row had decoded and encoded.
        prompt_tokens: Text, visual and newline tokens the language model read.
        prompt_tokens_shared: Prompt tokens that another row had computed.
        output_tokens: Tokens it wrote.
        kv_bytes: KV cache of prompt and output.
        kv_bytes_full: KV cache of prompt and output without compression.
        flops: Operations of matrix products by stage, as `gc2ray.models.flops.matmul_flops` counts
            them.
        flops_full: Operations by stage without compression.
        cache_read_bytes: KV cache that decoding read, a step's rows each their own.
        cache_read_bytes_full: KV cache that decoding would read without compression.
        decode_steps: Forwards of the language model, each over all rows that were live.
        energy_millijoules: Energy of the device while it worked on them; 0 if not measured.
        audits: Answers that were compared with uncompressed ones.
        audits_agreed: Audited answers that equal the uncompressed ones.
        similarity_millionths: Sum of their similarities, in millionths.
        audit_uncompressed_ns: Busy nanoseconds of the uncompressed answers, by stage; not part of
            other fields.
        audit_compressed_ns: Busy nanoseconds of the answers that they were compared with.
        escalated: Audited prompts that were answered again, by the retention of the final answer.
        escalated_agreed: Escalated prompts whose final answer equals the uncompressed one.
        escalation_ns: Busy nanoseconds of the replaced answers, by stage; not part of other fields.
        least_similar: Audited rows that differed most, as (difference in millionths, row key).
        stage_ns: Busy nanoseconds by stage (`STAGES`).
        input_starved_ns: Time that a worker was idle: waiting for input while rows remained.
        oom_splits: How often a batch ran out of device memory and was split in half.
        retention: Rows by actual retention, see `RETENTION_BUCKETS`.
        peak_device_bytes: Largest device memory in use; 0 if not measured.
        peak_host_bytes: Largest resident set of a worker process.
        slowest: Rows with the most busy time, as (ns, row key).
        largest: Rows with the largest KV cache, as (bytes, row key).
    """

    rows: int = 0
    by_status: dict[str, int] = field(default_factory=dict)
    empty_answers: int = 0
    visual_tokens_full: int = 0
    visual_tokens_kept: int = 0
    newline_tokens_full: int = 0
    newline_tokens: int = 0
    view_tokens_full: dict[str, int] = field(default_factory=dict)
    view_tokens_kept: dict[str, int] = field(default_factory=dict)
    images: int = 0
    images_shared: int = 0
    prompt_tokens: int = 0
    prompt_tokens_shared: int = 0
    output_tokens: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0
    flops: dict[str, int] = field(default_factory=dict)
    flops_full: dict[str, int] = field(default_factory=dict)
    cache_read_bytes: int = 0
    cache_read_bytes_full: int = 0
    decode_steps: int = 0
    energy_millijoules: int = 0
    audits: int = 0
    audits_agreed: int = 0
    similarity_millionths: int = 0
    audit_uncompressed_ns: dict[str, int] = field(default_factory=dict)
    audit_compressed_ns: dict[str, int] = field(default_factory=dict)
    escalated: dict[str, int] = field(default_factory=dict)
    escalated_agreed: dict[str, int] = field(default_factory=dict)
    escalation_ns: dict[str, int] = field(default_factory=dict)
    stage_ns: dict[str, int] = field(default_factory=dict)
    input_starved_ns: int = 0
    oom_splits: int = 0
    retention: dict[str, int] = field(default_factory=dict)
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    slowest: tuple[tuple[int, str], ...] = ()
    largest: tuple[tuple[int, str], ...] = ()
    least_similar: tuple[tuple[int, str], ...] = ()

    def __add__(self, other: RunStats) -> RunStats:
        total: dict[str, object] = {}
        for item in fields(self):
            a, b = getattr(self, item.name), getattr(other, item.name)
            if item.name.startswith("peak_"):
                total[item.name] = max(a, b)
            elif isinstance(a, dict):
                total[item.name] = merged((a, b))
            elif isinstance(a, tuple):
                total[item.name] = top([*a, *b])
            else:
                total[item.name] = a + b
        return RunStats(**total)  # type: ignore[arg-type]  # names and types are the fields' own

    def since(self, before: RunStats) -> RunStats:
        """The difference to an earlier state of the same totals; peaks are not subtracted."""
        names = ("input_starved_ns", "oom_splits", "decode_steps", "energy_millijoules")
        return replace(
            self, **{name: getattr(self, name) - getattr(before, name) for name in names}
        )

    @property
    def bad_rows(self) -> int:
        """Rows that were not answered."""
        return self.rows - self.by_status.get("ok", 0)

    def to_json(self) -> str:
        """All fields as JSON, zeros included: a missing number is not a zero."""
        return json.dumps({item.name: getattr(self, item.name) for item in fields(self)})

    @staticmethod
    def from_json(text: str | bytes) -> RunStats:
        """The inverse of `to_json`."""
        data = json.loads(text)
        for name in ("slowest", "largest", "least_similar"):
            data[name] = tuple((int(value), str(key)) for value, key in data.get(name, ()))
        return RunStats(**data)

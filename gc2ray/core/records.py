"""What goes in and what comes out: `Request` and `Answer`.

A row is an input row; an answer (or answer row) is written for each of its prompts. Only audited
answers have an `audit` and a `kept_mask` (see `gc2ray.engine.audit`). The types of the columns of
answers are in `gc2ray.core.schema`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gc2ray.core.errors import BadRow, Status
from gc2ray.core.stats import STAGES, retention_bucket

RECIPES_POLICY, UNCOMPRESSED = "recipe", "uncompressed"
"""Names of the compression policies that every engine has."""
ANSWER_COLUMNS: tuple[str, ...] = (
    "row_key", "source", "row", "prompt_index", "answer", "status", "error", "finish_reason",
    "prompt_tokens", "output_tokens", "visual_tokens_full", "visual_tokens_kept", "newline_tokens",
    "newline_tokens_full", "kept_per_view", "method", "retention_requested", "retention_actual",
    "kv_bytes", "kv_bytes_full", *(f"{stage}_ns" for stage in STAGES), "oom_splits", "attempt",
    "retry_round", "device", "worker", "audit", "kept_mask",
)  # fmt: skip
"""Names of the columns of answers, in order; here, because their types take pyarrow to import."""


@dataclass(frozen=True)
class ImageRef:
    """An image of a row: its encoded bytes, or the path to them."""

    data: bytes | None = None
    path: str | None = None


@dataclass(frozen=True)
class Request:
    """One prompt of a row, to be answered.

    Attributes:
        row_key: Unique in the run, see `gc2ray.core.shards.row_key`.
        source: Path of the source, relative to the input root.
        row: Row number in the source.
        images: The row's images; none for a row of text. The requests of a row share them.
        prompts: The prompt; length 1, or 0 if there is a fault.
        kept_columns: The kept input columns, as Arrow scalars or Python values.
        fault: Why the row cannot be answered, if reading it already showed that.
        prompt_index: Index of the prompt in its row; a row without prompts has one request, 0.
        prompt_count: Number of requests of the row, so that a lost one is noticed.
        is_audited: Whether it is answered twice, see `gc2ray.engine.audit`.
        policy: Name of the compression policy for its image (`gc2ray.compression.policy`); by
            default the recipe's.
    """

    row_key: str
    source: str
    row: int
    images: tuple[ImageRef, ...]
    prompts: tuple[str, ...]
    kept_columns: Mapping[str, Any] = field(default_factory=dict)
    fault: BadRow | None = None
    prompt_index: int = 0
    prompt_count: int = 1
    is_audited: bool = False
    policy: str = RECIPES_POLICY

    @property
    def seed(self) -> int:
        """A seed that depends on row and prompt only, never on batch, worker or attempt."""
        return int.from_bytes(hashlib.sha256(self.row_key.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Escalation:
    """How an audited row was answered again, with more visual tokens.

    Attributes:
        first_answer: The first answer; None if it failed.
        similarity: `scores.similarity` of the final answer and the uncompressed one.
        stage_ns: Time of the replaced answers, by stage; not written.
    """

    first_answer: str | None
    similarity: float
    stage_ns: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """The comparison of an answer with the uncompressed answer to the same prompt.

    Attributes:
        answer: The uncompressed answer; None if it failed.
        similarity: `scores.similarity` of that answer and the one with the recipe's compression: 1
            if they are the same, 0 if the latter failed, None if the former failed.
        stage_ns: Time of the uncompressed answer, by stage; not written.
        own_ns: Time of the answer that it was compared with, by stage; not written.
        escalation: Set if the row was answered again.
        retention: Retention of the uncompressed answer.
    """

    answer: str | None
    similarity: float | None
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    own_ns: Mapping[str, int] = field(default_factory=dict)
    escalation: Escalation | None = None
    retention: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One answer row; the documentation has a table of the columns.

    `kept_per_view` is one list per image, one count per view: the thumbnail first, None where there
    is none, then the crops. `kept_mask` has a bitmap for each view, in the same order, image after
    image: bit i, from the lowest of the first byte on, is token i in raster order.

    Some fields are not written: `token_ids`; `is_retryable`, set if not the row but the storage of
    its image failed, so that its shard is tried again. Others count in the statistics only:
    `images_encoded` and `images_shared`, the row's images that were encoded for it, and those that
    another row had encoded; `prompt_tokens_shared`, the number of
    prompt tokens that another row had computed; `full_per_view`, as `kept_per_view` before
    compression; `demand`, the work of the answer, and `demand_full`, its work without compression.
    """

    request: Request
    status: Status
    method: str
    retention_requested: float
    answer: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    visual_tokens_full: int | None = None
    visual_tokens_kept: int | None = None
    newline_tokens: int | None = None
    newline_tokens_full: int | None = None
    kept_per_view: tuple[tuple[int | None, ...], ...] | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    device: str = ""
    token_ids: tuple[int, ...] = ()
    is_retryable: bool = False
    images_encoded: int = 0
    images_shared: int = 0
    prompt_tokens_shared: int = 0
    oom_splits: int = 0
    full_per_view: tuple[tuple[int | None, ...], ...] | None = None
    demand: Demand | None = None
    demand_full: Demand | None = None
    audit: Audit | None = None
    kept_mask: tuple[bytes | None, ...] | None = None

    def __str__(self) -> str:
        """The answer's text, or why there is none."""
        return f"[{self.status}] {self.error}" if self.answer is None else self.answer

    def __repr__(self) -> str:
        text = f"answer={self.answer!r}" if self.answer is not None else f"error={self.error!r}"
        tokens = f"visual_tokens={self.visual_tokens_kept} of {self.visual_tokens_full}"
        kept = f", {tokens}" if self.visual_tokens_full else ""
        return f"Answer(status={str(self.status)!r}, {text}{kept})"

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain values, ready for JSON; names are those of the answer columns.

        Times are nanoseconds by stage, sizes bytes.
        """
        return {
            "status": str(self.status),
            "prompt": self.request.prompts[0] if self.request.prompts else None,
            **{name: getattr(self, name) for name in _PLAIN},
            "retention_actual": self.retention_actual,
            "kept_per_view": [list(counts) for counts in self.kept_per_view or ()],
            "stage_ns": dict(self.stage_ns),
        }

    @property
    def retention_actual(self) -> float | None:
        """Kept over full visual tokens, newlines in neither."""
        if not self.visual_tokens_full or self.visual_tokens_kept is None:
            return None
        return self.visual_tokens_kept / self.visual_tokens_full

    @property
    def busy_ns(self) -> int:
        """Time of all stages."""
        return sum(self.stage_ns.values())

    @property
    def retention_bucket(self) -> str | None:
        """See `gc2ray.core.stats.RETENTION_BUCKETS`; None without an image."""
        full, kept = self.visual_tokens_full, self.visual_tokens_kept or 0
        return f"{retention_bucket(kept, full):02d}" if full else None


_PLAIN = (
    "answer", "error", "finish_reason", "method", "retention_requested", "prompt_tokens",
    "output_tokens", "visual_tokens_full", "visual_tokens_kept", "newline_tokens",
    "newline_tokens_full", "kv_bytes", "kv_bytes_full", "device",
)  # fmt: skip
"""Fields of an answer that are plain values."""


@dataclass(frozen=True)
class Demand:
    """The work of an answer.

    Attributes:
        flops: Operations of matrix products by stage, as `matmul_flops` counts them.
        cache_read_bytes: Bytes of the KV cache that decoding reads.
    """

    flops: Mapping[str, int]
    cache_read_bytes: int

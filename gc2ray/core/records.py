"""What goes in and what comes out: `Request` and `Answer`.

A row is an input row; an answer, or answer row, is what is written for one of its prompts. Only
audited answers have an `audit` and a `kept_mask` (see `gc2ray.engine.audit`). The columns that
answers are written to are in `gc2ray.core.schema`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gc2ray.core.errors import BadRow, Status
from gc2ray.core.stats import retention_bucket

RECIPES_POLICY, UNCOMPRESSED = "recipe", "uncompressed"
"""Ways of compression that every engine knows."""


@dataclass(frozen=True)
class ImageRef:
    """An image of a row: its encoded bytes, or where they are."""

    data: bytes | None = None
    path: str | None = None


@dataclass(frozen=True)
class Request:
    """One prompt of a row, to answer.

    Attributes:
        row_key: Unique in the run, see `gc2ray.output.plan.row_key`.
        source: Path of the source, relative to the input root.
        row: Row number in the source.
        images: The row's images; length 1 for now. The requests of a row share them.
        prompts: The prompt; length 1, or 0 where there is a fault.
        carried: The input columns that are written back, Arrow scalars or Python values.
        fault: Set where the source already knows that there can be no answer.
        prompt_index: Which of the row's prompts it is; a row without any has one request, with 0.
        prompt_count: How many requests the row has, so that a lost one is missed.
        is_audited: It is answered twice, see `gc2ray.engine.audit`.
        way: How its image is to be compressed, see `gc2ray.compression.policy`; as a rule
            as the recipe says.
    """

    row_key: str
    source: str
    row: int
    images: tuple[ImageRef, ...]
    prompts: tuple[str, ...]
    carried: Mapping[str, Any] = field(default_factory=dict)
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
    """What became of an audited row that was answered anew, with more visual tokens.

    Attributes:
        first_answer: What it was answered before; None where that failed.
        agreement: Of the answer that it has now with the uncompressed one.
        stage_ns: Time of those of its answers that were replaced, by stage; not written.
    """

    first_answer: str | None
    agreement: float
    stage_ns: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """A second look at an answer.

    Attributes:
        answer: What the model says uncompressed; None where it failed.
        agreement: `scores.similarity` of that and what the recipe's compression
            gave: 1 where they are the same, 0 where the latter failed, None where the former did.
        stage_ns: Time that the uncompressed answer took, by stage; not written.
        own_ns: The same of the one that it was compared with.
        escalation: Where the row was answered anew.
        retention: Of the uncompressed answer.
    """

    answer: str | None
    agreement: float | None
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    own_ns: Mapping[str, int] = field(default_factory=dict)
    escalation: Escalation | None = None
    retention: float = 1.0


@dataclass(frozen=True)
class Answer:
    """One answer row; see the README's table of columns for the meaning of each.

    `kept_per_view` is one list per image, one count per view. `kept_mask` has a bitmap for each
    view: bit i, from the lowest of the first byte on, is token i in raster order.

    Some are not written: `token_ids`; `retry`, which says that not the row but its image's storage
    failed, so that its shard is to be tried again; and, counted in the statistics only,
    `image_shared`: another row had encoded the image; `prompt_tokens_shared`: so many prompt tokens
    another row had computed; `full_per_view`, as `kept_per_view` before compression; `demand`, what
    the answer asked of the machine, and `demand_full`, what it would have asked uncompressed.
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
    kept_per_view: tuple[tuple[int, ...], ...] | None = None
    kv_bytes: int | None = None
    kv_bytes_full: int | None = None
    stage_ns: Mapping[str, int] = field(default_factory=dict)
    device: str = ""
    token_ids: tuple[int, ...] = ()
    retry: bool = False
    image_shared: bool = False
    prompt_tokens_shared: int = 0
    oom_splits: int = 0
    full_per_view: tuple[tuple[int, ...], ...] | None = None
    demand: Demand | None = None
    demand_full: Demand | None = None
    audit: Audit | None = None
    kept_mask: tuple[bytes, ...] | None = None

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
    """What an answer asks of a machine.

    Attributes:
        flops: As `matmul_flops`, by stage.
        cache_read_bytes: KV cache that decoding reads.
    """

    flops: Mapping[str, int]
    cache_read_bytes: int

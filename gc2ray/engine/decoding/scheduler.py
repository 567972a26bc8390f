"""`Scheduler`: which rows are decoded together, and which slots of the KV cache they have.

A row is admitted when the `KvCache` has slots for its prompt and its whole answer. The row that has
waited longest comes first, then rows of about its length, up to the prompt tokens of a step.
Prompts that begin alike (`Prompt.prefix_key`) share that beginning: the first row computes it, the
others copy its keys and values. Prefixes stay in the cache until a row needs their slots.

Not covered: taking slots back from a live row (all of them are reserved when it is admitted),
splitting a prompt over several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange
from gc2ray.engine.decoding.prefix_cache import PrefixCache
from gc2ray.models.base import Prompt


@dataclass(frozen=True)
class DecodeLimits:
    """How much is decoded at a time.

    Attributes:
        kv_tokens: Tokens of prompts and answers that live rows may hold.
        prefill_tokens: Prompt tokens admitted per step, if more than one prompt is; at least one
            prompt always is.
        live_rows: Rows decoded together; None where only tokens count.
        graph_steps: Decoding steps between two checks of which rows have ended, while no row is
            admitted; more than 1 needs attention that runs on the device alone (`attend_by_row`
            does not).
    """

    kv_tokens: int
    prefill_tokens: int = 2048
    live_rows: int | None = None
    graph_steps: int = 1

    def __post_init__(self) -> None:
        if min(self.kv_tokens, self.prefill_tokens, self.live_rows or 1, self.graph_steps) < 1:
            raise ValueError(f"all limits must be at least 1: {self}")


@dataclass(eq=False)
class DecodeRow:
    """A prompt and its answer so far: live while it has slots, else waiting.

    Attributes:
        tag: The caller's number for it.
        numbers: Random numbers, one for each token of the answer; empty for a greedy row.
        next_position: Position of the answer's first token.
        slots: Its slots of the KV cache.
        cached: Its tokens whose keys and values are in the cache.
        shared: Cached tokens that were copied from another row's prefix.
        owns_prefix: Whether it computed a prefix that others may copy.
        alone: Whether a step with this row failed, so that it runs with no other row.
        oom_splits: Times that a step with this row ran out of memory.
    """

    tag: int
    prompt: Prompt
    sampling: GenerationConfig
    numbers: list[float]
    next_position: int
    slots: SlotRange | None = None
    cached: int = 0
    shared: int = 0
    owns_prefix: bool = False
    alone: bool = False
    oom_splits: int = 0
    tokens: list[int] = field(default_factory=list)
    prefill_ns: int = 0
    generate_ns: int = 0

    @property
    def max_tokens(self) -> int:
        """Tokens of the prompt and the longest possible answer."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def had(self) -> tuple[int, ...]:
        """Tokens that the repetition penalty applies to: the prompt's and the answer's so far."""
        return (*self.prompt.penalised_ids, *self.tokens) if self.penalised else ()

    @property
    def penalised(self) -> bool:
        """Whether there is a repetition penalty."""
        return self.sampling.penalty != 1

    @property
    def number(self) -> float:
        """The random number for its next token; 0 for a greedy row."""
        return self.numbers[len(self.tokens)] if self.numbers else 0.0

    @property
    def start(self) -> int:
        """Its first slot.

        Raises:
            ValueError: It is not live.
        """
        if self.slots is None:
            raise ValueError(f"row {self.tag} is not live")
        return self.slots.start


class Scheduler:
    """Rows that wait and rows that are live.

    Args:
        kv_cache: Where live rows get their slots.
        limits: How much is decoded at a time.

    Attributes:
        live: Rows that are being decoded, those admitted first in front.
    """

    def __init__(self, kv_cache: KvCache, limits: DecodeLimits) -> None:
        self._kv_cache = kv_cache
        self._limits = limits
        self._prefixes = PrefixCache(kv_cache)
        self._waiting: list[DecodeRow] = []
        self.live: list[DecodeRow] = []
        self._max_rows, self._max_prefill = limits.live_rows, limits.prefill_tokens

    def __len__(self) -> int:
        return len(self._waiting) + len(self.live)

    @property
    def is_waiting(self) -> bool:
        """Whether rows wait to be admitted."""
        return bool(self._waiting)

    def accepts(self, prompt: Prompt, sampling: GenerationConfig) -> bool:
        """Whether a prompt may be added: not while two steps' worth of prompt tokens wait.

        Raises:
            BadRow: Prompt and answer are longer than the whole KV cache (`too_long`).
        """
        tokens = len(prompt) + sampling.max_new_tokens
        if self.slots_for(tokens) > self._limits.kv_tokens:
            limit = f"the KV cache holds {self._limits.kv_tokens} (cluster.kv_tokens)"
            raise BadRow(Status.TOO_LONG, f"{tokens} tokens of prompt and answer; {limit}")
        waiting = sum(len(other.prompt) for other in self._waiting)
        return not self._waiting or waiting + len(prompt) <= 2 * self._limits.prefill_tokens

    def add(self, row: DecodeRow) -> None:
        """Queue a row."""
        self._waiting.append(row)

    def slots_for(self, tokens: int) -> int:
        """Slots that a row of so many tokens needs; a burst writes beyond the row's end."""
        return tokens + self._limits.graph_steps - 1

    def admit(self) -> list[DecodeRow]:
        """Give slots to rows that start now: the oldest one and others of about its length."""
        if not self._waiting:
            return []
        oldest, tokens = self._waiting[0], 0
        neighbours = sorted(
            self._waiting[1:], key=lambda row: abs(row.max_tokens - oldest.max_tokens)
        )
        admitted: list[DecodeRow] = []
        started: set[str] = set()  # prefixes that this step computes: they cannot be copied yet
        for row in [oldest, *neighbours]:
            key = row.prompt.prefix_key
            new = len(row.prompt) - (row.prompt.prefix if key in self._prefixes else 0)
            if key in started or (admitted and tokens + new > self._max_prefill):
                continue
            if not self._may_join(row, admitted) or not self._allocate(row, admitted):
                break
            admitted.append(row)
            tokens += len(row.prompt) - row.cached
            if key is not None and key not in self._prefixes:
                started.add(key)
        self._waiting = [row for row in self._waiting if row.slots is None]
        return admitted

    def _may_join(self, row: DecodeRow, admitted: Sequence[DecodeRow]) -> bool:
        others = [*self.live, *admitted]
        if row.alone or any(other.alone for other in others):
            return not others
        return self._max_rows is None or len(others) < self._max_rows

    def _allocate(self, row: DecodeRow, admitted: Sequence[DecodeRow]) -> bool:
        """Give a row slots, if need be those of prefixes that no live row owns."""
        key, count = row.prompt.prefix_key, self.slots_for(row.max_tokens)
        slots = self._kv_cache.allocate(count)
        while slots is None and self._prefixes.drop_oldest(but=key):
            slots = self._kv_cache.allocate(count)
        if slots is None and not self.live and not admitted and self._prefixes.drop_oldest():
            slots = self._kv_cache.allocate(count)  # only its own prefix was left to drop
        if slots is None:
            return False
        row.slots = slots
        prefix = self._prefixes.find(key)
        if prefix is not None:
            self._kv_cache.copy(prefix, slots.start)
            row.cached = row.shared = len(prefix)
        return True

    def keep_prefix(self, row: DecodeRow) -> None:
        """Let other rows copy the prefix that a row has just computed."""
        key = row.prompt.prefix_key
        if key is not None and row.slots is not None and key not in self._prefixes:
            start = row.slots.start
            self._prefixes.add(key, SlotRange(start, start + row.prompt.prefix))
            row.owns_prefix = True

    def release(self, row: DecodeRow) -> None:
        """Take a row's slots back; a prefix that it computed stays in the cache."""
        slots = row.slots
        if slots is None:
            return
        key = row.prompt.prefix_key
        if row.owns_prefix and key is not None:
            self._prefixes.disown(key)
            slots = SlotRange(slots.start + row.prompt.prefix, slots.stop)
        self._kv_cache.release(slots)
        row.slots, row.owns_prefix = None, False

    def requeue(self, rows: Sequence[DecodeRow], *, alone: bool) -> None:
        """Let rows start over, before all others.

        Args:
            rows: Rows of a step that failed.
            alone: Whether each of them runs with no other row from now on.
        """
        self.live = [row for row in self.live if row not in rows]
        for row in rows:
            self.release(row)
            row.cached, row.shared, row.tokens = 0, 0, []
            row.alone = row.alone or alone
        self._waiting = [*rows, *self._waiting]

    def lower_limits(self, rows: int) -> None:
        """After a step of so many rows ran out of memory, decode half as many together."""
        self._max_rows, self._max_prefill = max(1, rows // 2), max(1, self._max_prefill // 2)

    def reset_limits(self) -> None:
        """Return to the configured limits."""
        self._max_rows, self._max_prefill = self._limits.live_rows, self._limits.prefill_tokens

    def clear_prefixes(self) -> None:
        """Drop the prefixes that no live row owns."""
        while self._prefixes.drop_oldest():
            pass

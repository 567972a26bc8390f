"""Continuous batching over prompt embeddings: rows enter and leave while others go on.

Every step runs one packed forward over all live rows' next token and over whole prompts that are
let in, without padding. A row is let in when the `KvCache` has room for its prompt and its answer,
counted in tokens; it leaves at its own limit or end, and its room goes to the next. Nothing waits
for the slowest row, and nothing is computed for padding.

* Greedy and sampled rows share steps. A row's tokens depend on its prompt, its sampling and its
  seed, not on its neighbours, its place or the order of arrival (float32; in half precision the
  shape of a batch changes the rounding).
* Prompts that begin alike (`Prompt.prefix_key`) share that beginning: the first one computes it,
  the others copy its keys and values and compute the rest.
* Out of memory puts the youngest half of what was tried back into the queue, lowers the number of
  live rows for good, and goes on; a row that fails alone finishes with its error. A lost device is
  not a row's error and is raised.
* A row whose logits are not finite finishes with an error; its neighbours do not notice.
* A prompt's positions may have gaps (`Prompt.positions`); its answer goes on after the last one.

Not covered: taking room back from a live row (all of it is reserved when it is let in), splitting a
prompt over several steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.stats import apportion
from gc2ray.engine.decoding.cuda_graph import CudaGraphRunner, GraphRow, GraphShape
from gc2ray.engine.decoding.decoder import Completion, end_reason, not_finite
from gc2ray.engine.decoding.kv_cache import KvCache, SlotRange
from gc2ray.engine.decoding.prefix_cache import PrefixCache
from gc2ray.engine.decoding.sampler import Repetition, Sampler, row_numbers
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention import Attend, Chunk, Step
from gc2ray.models.layers.attention_backends import chosen
from gc2ray.models.llama import LanguageModel

FAILURES = (RuntimeError, ValueError, IndexError)
"""What a step may raise on account of a row; the first covers out of memory."""


@dataclass(frozen=True)
class DecodeLimits:
    """How much may be going on at a time.

    Attributes:
        kv_tokens: Tokens of prompts and answers that live rows may hold.
        prefill_tokens: Prompt tokens let in per step, if more than one prompt is; at least one is.
        live_rows: Rows that may be live; None where only tokens count.
        burst: Steps that live rows take before the host looks which have ended, while none is let
            in; more than 1 needs attention that works on the device alone (`attend_by_row` does
            not).
    """

    kv_tokens: int
    prefill_tokens: int = 2048
    live_rows: int | None = None
    burst: int = 1

    def __post_init__(self) -> None:
        if min(self.kv_tokens, self.prefill_tokens, self.live_rows or 1, self.burst) < 1:
            raise ValueError(f"all room must be at least 1: {self}")


@dataclass(eq=False)
class _Row:
    """A prompt on its way: waiting without an extent, live with one.

    Attributes:
        cached: Its tokens in the arena.
        shared: Those of them that were copied from another row's prefix.
        owns: It computed a prefix that others may copy.
        alone: It was part of a step that failed: it now runs with no other row.
        oom_splits: Times that memory was short for it and others.
    """

    tag: int
    prompt: Prompt
    sampling: GenerationConfig
    numbers: list[float]
    next_position: int
    extent: SlotRange | None = None
    cached: int = 0
    shared: int = 0
    owns: bool = False
    alone: bool = False
    oom_splits: int = 0
    tokens: list[int] = field(default_factory=list)
    prefill_ns: int = 0
    generate_ns: int = 0

    @property
    def tokens_at_most(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def had(self) -> tuple[int, ...]:
        """Tokens that it is to repeat less: of its prompt, and of its answer so far."""
        return (*self.prompt.token_ids, *self.tokens) if self.penalised else ()

    @property
    def penalised(self) -> bool:
        """Whether it is to repeat itself less."""
        return self.sampling.penalty != 1

    @property
    def number(self) -> float:
        """What it draws its next token with; nothing where it is greedy."""
        return self.numbers[len(self.tokens)] if self.numbers else 0.0

    def chunk(self) -> Chunk:
        """Its place in the next step.

        Raises:
            ValueError: It is not live.
        """
        if self.extent is None:
            raise ValueError(f"row {self.tag} is not live")
        new = 1 if self.tokens else len(self.prompt) - self.cached
        return Chunk(self.extent.start, self.cached + new, new)

    def before_burst(self) -> GraphRow:
        """What a burst needs to know of it.

        Raises:
            ValueError: It is not live.
        """
        if self.extent is None:
            raise ValueError(f"row {self.tag} is not live")
        done = len(self.tokens)
        return GraphRow(
            token=self.tokens[-1],
            position=self.next_position + done - 1,
            start=self.extent.start,
            length=self.cached,
            sampling=self.sampling,
            numbers=tuple(self.numbers[done:]),
            had=self.had,
        )


class ContinuousBatchDecoder:
    """A `Decoder` with continuous batching; see the module.

    Args:
        model: What decodes.
        room: How much may be going on.
        eos: Token ids that end an answer.
        attend: How attention is computed; None for what suits the device.

    Attributes:
        oom_splits: Times that the device's memory was short and live rows were halved.
        steps: Forwards so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        room: DecodeLimits,
        *,
        eos: Iterable[int],
        attend: Attend | None = None,
    ) -> None:
        self._model = model
        self._room = room
        self._eos = frozenset(eos)
        self._attend = attend or chosen(model.kv_shape, model.heads, model.dtype, model.device)
        tokens = room.kv_tokens + (room.burst > 1)
        self._pool = KvCache(model.kv_shape, tokens, dtype=model.dtype, device=model.device)
        self._prefixes = PrefixCache(self._pool)
        self._waiting: list[_Row] = []
        self._live: list[_Row] = []
        self._limits = (room.live_rows, room.prefill_tokens)
        self._bursts: dict[GraphShape, CudaGraphRunner] = {}
        on_gpu = model.device.type == "cuda"
        self._graph_pool = torch.cuda.graph_pool_handle() if on_gpu else None
        if room.burst > 1:
            self._pool.admit(1)  # the place that bursts write to for rows that are missing
        self.oom_splits = self.steps = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._live)

    @property
    def wants_more(self) -> bool:
        """Nothing waits for room."""
        return not self._waiting

    def submit(self, tag: int, prompt: Prompt, sampling: GenerationConfig) -> bool:
        """Take a prompt while two steps' worth of prompt tokens are not yet waiting.

        Raises:
            BadRow: Prompt and answer are longer than the whole KV cache (`too_long`).
        """
        tokens = len(prompt) + sampling.max_new_tokens
        if self._reserve(tokens) > self._room.kv_tokens:
            limit = f"the KV cache has room for {self._room.kv_tokens} (cluster.kv_tokens)"
            raise BadRow(Status.TOO_LONG, f"{tokens} tokens of prompt and answer; {limit}")
        waiting = sum(len(other.prompt) for other in self._waiting)
        if self._waiting and waiting + len(prompt) > 2 * self._room.prefill_tokens:
            return False
        numbers = row_numbers(sampling).tolist() if sampling.temperature > 0 else []
        self._waiting.append(_Row(tag, prompt, sampling, numbers, _next_position(prompt)))
        return True

    def clear_cache(self) -> None:
        """Drop the prefixes that no live row holds."""
        while self._prefixes.drop_oldest():
            pass

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Let in what fits, and compute the next token of every live row."""
        admitted = self._let_in()
        rows = [*self._live, *admitted]
        if not rows:
            return []
        try:
            if admitted or self._room.burst == 1:
                self._advance(rows)
            else:
                self._advance_several(rows)
        except torch.AcceleratorError:
            raise
        except FAILURES as error:
            return self._recover(rows, admitted, error)
        for row in admitted:
            self._remember_prefix(row)
        ended = [(row, end_reason(row.tokens, row.sampling, self._eos)) for row in rows]
        self._live = [row for row, reason in ended if reason is None]
        return [self._finished(row, reason) for row, reason in ended if reason is not None]

    def _advance(self, rows: Sequence[_Row]) -> None:
        """One forward over all rows: live ones first, then those that were let in."""
        started = time.perf_counter_ns()
        step = Step(tuple(row.chunk() for row in rows), self._pool.arena)
        hidden, positions = self._inputs(rows)
        logits = self._model.logits(hidden, positions, step, self._attend)
        samplings, numbers = [row.sampling for row in rows], [row.number for row in rows]
        drawing = Sampler.from_samplings(samplings, numbers, self._model.device)
        tokens = drawing.tokens(_penalised(rows, logits)).tolist()
        passed = time.perf_counter_ns() - started
        self.steps += 1
        shares = apportion(passed, [chunk.new for chunk in step.chunks])
        for row, token, chunk, share in zip(rows, tokens, step.chunks, shares, strict=True):
            if row.tokens:
                row.generate_ns += share
            else:
                row.prefill_ns += share
            row.cached = chunk.length
            row.tokens.append(token)

    def _advance_several(self, rows: Sequence[_Row]) -> None:
        """A burst: each row gets its next tokens, up to its end."""
        started = time.perf_counter_ns()
        steps = min(
            self._room.burst,
            max(row.sampling.max_new_tokens - len(row.tokens) for row in rows),
        )
        shape = GraphShape.from_counts(
            len(rows),
            self._reserve(max(row.tokens_at_most for row in rows)),
            draws=any(row.numbers for row in rows),
            penalises=any(row.penalised for row in rows),
        )
        if shape not in self._bursts:
            self._bursts[shape] = CudaGraphRunner(
                self._model,
                self._pool.arena,
                self._attend,
                shape,
                self._room.burst,
                self._graph_pool,
            )
        found = self._bursts[shape].run([row.before_burst() for row in rows], steps)
        self.steps += steps
        taken = [self._take(row, tokens) for row, tokens in zip(rows, found, strict=True)]
        shares = apportion(time.perf_counter_ns() - started, taken)
        for row, share in zip(rows, shares, strict=True):
            row.generate_ns += share

    def _take(self, row: _Row, tokens: Sequence[int]) -> int:
        """Add tokens up to the row's end; how many that are."""
        for count, token in enumerate(tokens, start=1):
            row.cached += 1
            row.tokens.append(token)
            if end_reason(row.tokens, row.sampling, self._eos) is not None:
                return count
        return len(tokens)

    def _inputs(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Embeddings (T, D) and positions (T,) of the rows' new tokens."""
        device = self._model.device
        live = [row for row in rows if row.tokens]
        embeds, positions = [], []
        if live:
            at = [row.next_position + len(row.tokens) - 1 for row in live]
            last = torch.tensor([[row.tokens[-1] for row in live], at]).to(device)
            embeds.append(self._model.embed(last[0]))
            positions.append(last[1])
        for row in rows[len(live) :]:
            embeds.append(row.prompt.embeds[row.cached :])
            positions.append(_positions(row.prompt, device)[row.cached :])
        return torch.cat(embeds), torch.cat(positions)

    def _let_in(self) -> list[_Row]:
        """Rows that start now: the one that waited longest, and others of about its length."""
        if not self._waiting:
            return []
        oldest, tokens = self._waiting[0], 0
        neighbours = sorted(
            self._waiting[1:], key=lambda row: abs(row.tokens_at_most - oldest.tokens_at_most)
        )
        admitted: list[_Row] = []
        started: set[str] = set()  # prefixes that this step computes: nobody can copy them yet
        for row in [oldest, *neighbours]:
            key = row.prompt.prefix_key
            new = len(row.prompt) - (row.prompt.prefix if key in self._prefixes else 0)
            if key in started or (admitted and tokens + new > self._limits[1]):
                continue
            if not self._may_join(row, admitted) or not self._place(row, admitted):
                break
            admitted.append(row)
            tokens += len(row.prompt) - row.cached
            if key is not None and key not in self._prefixes:
                started.add(key)
        self._waiting = [row for row in self._waiting if row.extent is None]
        return admitted

    def _may_join(self, row: _Row, admitted: Sequence[_Row]) -> bool:
        others = [*self._live, *admitted]
        if row.alone or any(other.alone for other in others):
            return not others
        return self._limits[0] is None or len(others) < self._limits[0]

    def _reserve(self, tokens: int) -> int:
        """Token places for a row of so many tokens; a burst writes behind its end."""
        return tokens + self._room.burst - 1

    def _place(self, row: _Row, admitted: Sequence[_Row]) -> bool:
        """Find room for a row, if need be at the cost of prefixes that no live row holds."""
        key, places = row.prompt.prefix_key, self._reserve(row.tokens_at_most)
        extent = self._pool.admit(places)
        while extent is None and self._prefixes.drop_oldest(but=key):
            extent = self._pool.admit(places)
        if extent is None and not self._live and not admitted and self._prefixes.drop_oldest():
            extent = self._pool.admit(places)  # its own prefix was in the way
        if extent is None:
            return False
        row.extent = extent
        prefix = self._prefixes.find(key)
        if prefix is not None:
            into = self._pool.places(SlotRange(extent.start, extent.start + len(prefix)))
            into.copy_(self._pool.places(prefix))
            row.cached = row.shared = len(prefix)
        return True

    def _remember_prefix(self, row: _Row) -> None:
        key = row.prompt.prefix_key
        if key is not None and row.extent is not None and key not in self._prefixes:
            start = row.extent.start
            self._prefixes.remember(key, SlotRange(start, start + row.prompt.prefix))
            row.owns = True

    def _finished(self, row: _Row, reason: str) -> Completion:
        self._vacate(row)
        failed = reason == "error"
        return Completion(
            row.tag,
            () if failed else tuple(row.tokens),
            reason,
            row.prefill_ns,
            row.generate_ns,
            error=not_finite(len(row.tokens) - 1) if failed else None,
            shared=row.shared,
            oom_splits=row.oom_splits,
        )

    def _vacate(self, row: _Row) -> None:
        """Give a row's room back; a prefix that it computed stays."""
        extent = row.extent
        if extent is None:
            return
        key = row.prompt.prefix_key
        if row.owns and key is not None:
            self._prefixes.leave(key)
            extent = SlotRange(extent.start + row.prompt.prefix, extent.stop)
        self._pool.release(extent)
        row.extent, row.owns = None, False

    def _recover(
        self, rows: Sequence[_Row], admitted: Sequence[_Row], error: Exception
    ) -> list[Completion]:
        """After a step that failed: blame the one row there was, or go on with fewer."""
        memory = isinstance(error, torch.OutOfMemoryError)
        if memory and self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._live = [row for row in rows if row not in admitted]
        if len(rows) == 1:
            return [self._blame(rows[0], error)]
        if memory:
            self.oom_splits += 1
            for row in rows:
                row.oom_splits += 1
            self._limits = (max(1, len(rows) // 2), max(1, self._limits[1] // 2))
        back = list(admitted) or self._live[len(self._live) // 2 :]
        self._live = [row for row in self._live if row not in back]
        for row in back:
            self._vacate(row)
            row.cached, row.shared, row.tokens = 0, 0, []
            row.alone = row.alone or not memory
        self._waiting = [*back, *self._waiting]
        return []

    def _blame(self, row: _Row, error: Exception) -> Completion:
        """A row that failed with nobody beside it; if for memory, the others need no less room."""
        self._vacate(row)
        self._live = []
        self._limits = (self._room.live_rows, self._room.prefill_tokens)
        times = (row.prefill_ns, row.generate_ns)
        return Completion(row.tag, (), "error", *times, error, oom_splits=row.oom_splits)


def _penalised(rows: Sequence[_Row], logits: Tensor) -> Tensor:
    """What rows draw from: their logits, once what they repeat is less likely."""
    if not any(row.penalised for row in rows):
        return logits
    repetition = Repetition.none(len(rows), logits.shape[1], logits.device)
    repetition.load([row.sampling for row in rows], [row.had for row in rows])
    return repetition.applied(logits)


def _next_position(prompt: Prompt) -> int:
    return len(prompt) if prompt.positions is None else int(prompt.positions[-1]) + 1


def _positions(prompt: Prompt, device: torch.device) -> Tensor:
    if prompt.positions is None:
        return torch.arange(len(prompt), device=device)
    return prompt.positions.to(device)

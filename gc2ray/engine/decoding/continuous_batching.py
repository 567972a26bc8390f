"""Continuous batching over prompt embeddings: rows enter and leave while others are decoded.

Every step runs one packed forward over the next token of all live rows and over the whole prompts
of newly admitted rows, without padding. A row is admitted when the KV cache has slots for its
prompt and its answer (`gc2ray.engine.decoding.scheduler`); it leaves at its own limit or end, and
its slots go to the next row. No row waits for the slowest, and nothing is computed for padding.

* Greedy and sampled rows share steps. A row's tokens depend on its prompt, its sampling and its
  seed, not on its neighbours, its slots or the order of arrival (float32; in half precision the
  shape of a batch changes the rounding).
* When a step runs out of memory, the youngest half of its rows is queued again, and from then on
  fewer rows are live; a row that fails alone finishes with its error. A lost device is not a row's
  error and is raised.
* A row whose logits are not finite finishes with an error; its neighbours are not affected.
* A prompt's positions may have gaps (`Prompt.positions`); its answer continues after the last one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.stats import apportion
from gc2ray.engine.decoding.cuda_graph import CudaGraphRunner, GraphRow, GraphShape
from gc2ray.engine.decoding.decoder import ROW_ERRORS, Completion, end_reason, not_finite
from gc2ray.engine.decoding.kv_cache import KvCache
from gc2ray.engine.decoding.sampler import Repetition, Sampler, row_numbers
from gc2ray.engine.decoding.scheduler import DecodeLimits, DecodeRow, Scheduler
from gc2ray.models.base import Prompt
from gc2ray.models.layers.attention import Attend, Chunk, Step
from gc2ray.models.layers.attention_backends import choose_attention
from gc2ray.models.llama import LanguageModel


class ContinuousBatchDecoder:
    """A `Decoder` with continuous batching; see the module.

    Args:
        model: The language model.
        limits: How much is decoded at a time.
        eos: Token ids that end an answer.
        attend: How attention is computed; None for the fastest on the device.

    Attributes:
        oom_splits: How often a step ran out of memory and live rows were split in half.
        steps: Forwards so far.
    """

    def __init__(
        self,
        model: LanguageModel,
        limits: DecodeLimits,
        *,
        eos: Iterable[int],
        attend: Attend | None = None,
    ) -> None:
        self._model = model
        self._graph_steps = limits.graph_steps
        self._eos = frozenset(eos)
        self._attend = attend or choose_attention(
            model.kv_shape, model.heads, model.dtype, model.device
        )
        tokens = limits.kv_tokens + (limits.graph_steps > 1)
        self._kv_cache = KvCache(model.kv_shape, tokens, dtype=model.dtype, device=model.device)
        self._scheduler = Scheduler(self._kv_cache, limits)
        self._graphs: dict[GraphShape, CudaGraphRunner] = {}
        on_gpu = model.device.type == "cuda"
        self._graph_pool = torch.cuda.graph_pool_handle() if on_gpu else None
        if limits.graph_steps > 1:
            self._kv_cache.allocate(1)  # the slot that bursts write to for rows that are missing
        self.oom_splits = self.steps = 0

    def __len__(self) -> int:
        return len(self._scheduler)

    @property
    def wants_more(self) -> bool:
        """Whether no row waits to be admitted."""
        return not self._scheduler.is_waiting

    def submit(self, tag: int, prompt: Prompt, sampling: GenerationConfig) -> bool:
        """Take a prompt, unless two steps' worth of prompt tokens are waiting already.

        Raises:
            BadRow: Prompt and answer are longer than the whole KV cache (`too_long`).
        """
        if not self._scheduler.accepts(prompt, sampling):
            return False
        numbers = row_numbers(sampling).tolist() if sampling.temperature > 0 else []
        self._scheduler.add(DecodeRow(tag, prompt, sampling, numbers, _next_position(prompt)))
        return True

    def clear_cache(self) -> None:
        """Drop the prefixes that no live row owns."""
        self._scheduler.clear_prefixes()

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit rows, and compute the next token of every live row."""
        admitted = self._scheduler.admit()
        rows = [*self._scheduler.live, *admitted]
        if not rows:
            return []
        try:
            if admitted or self._graph_steps == 1:
                self._run_step(rows)
            else:
                self._run_graph_steps(rows)
        except torch.AcceleratorError:
            raise
        except ROW_ERRORS as error:
            return self._recover(rows, admitted, error)
        for row in admitted:
            self._scheduler.keep_prefix(row)
        ended = [(row, end_reason(row.tokens, row.sampling, self._eos)) for row in rows]
        self._scheduler.live = [row for row, reason in ended if reason is None]
        return [self._finish(row, reason) for row, reason in ended if reason is not None]

    def _run_step(self, rows: Sequence[DecodeRow]) -> None:
        """One forward over all rows: live ones first, then the admitted ones."""
        started = time.perf_counter_ns()
        chunks = [_chunk(row) for row in rows]
        step = Step.from_chunks(chunks, self._kv_cache.states)
        hidden, positions = self._inputs(rows)
        logits = self._model.logits(hidden, positions, step, self._attend)
        samplings, numbers = [row.sampling for row in rows], [row.number for row in rows]
        sampler = Sampler.from_samplings(samplings, numbers, self._model.device)
        tokens = sampler.tokens(_penalised(rows, logits)).tolist()
        passed = time.perf_counter_ns() - started
        self.steps += 1
        shares = apportion(passed, [chunk.new for chunk in chunks])
        for row, token, chunk, share in zip(rows, tokens, chunks, shares, strict=True):
            if row.tokens:
                row.generate_ns += share
            else:
                row.prefill_ns += share
            row.cached = chunk.length
            row.tokens.append(token)

    def _run_graph_steps(self, rows: Sequence[DecodeRow]) -> None:
        """Several steps: each row gets its next tokens, up to its end."""
        started = time.perf_counter_ns()
        longest_rest = max(row.sampling.max_new_tokens - len(row.tokens) for row in rows)
        steps = min(self._graph_steps, longest_rest)
        written = self._graph(rows).run([_graph_row(row) for row in rows], steps)
        self.steps += steps
        taken = [self._take(row, tokens) for row, tokens in zip(rows, written, strict=True)]
        shares = apportion(time.perf_counter_ns() - started, taken)
        for row, share in zip(rows, shares, strict=True):
            row.generate_ns += share

    def _graph(self, rows: Sequence[DecodeRow]) -> CudaGraphRunner:
        """The runner of bursts of these rows."""
        shape = GraphShape.from_counts(
            len(rows),
            self._scheduler.slots_for(max(row.max_tokens for row in rows)),
            draws=any(row.numbers for row in rows),
            penalises=any(row.penalised for row in rows),
        )
        if shape not in self._graphs:
            self._graphs[shape] = CudaGraphRunner(
                self._model,
                self._kv_cache.states,
                self._attend,
                shape,
                self._graph_steps,
                self._graph_pool,
            )
        return self._graphs[shape]

    def _take(self, row: DecodeRow, tokens: Sequence[int]) -> int:
        """Add tokens up to the row's end, and return how many were added."""
        for count, token in enumerate(tokens, start=1):
            row.cached += 1
            row.tokens.append(token)
            if end_reason(row.tokens, row.sampling, self._eos) is not None:
                return count
        return len(tokens)

    def _inputs(self, rows: Sequence[DecodeRow]) -> tuple[Tensor, Tensor]:
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

    def _finish(self, row: DecodeRow, reason: str) -> Completion:
        self._scheduler.release(row)
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

    def _recover(
        self, rows: Sequence[DecodeRow], admitted: Sequence[DecodeRow], error: Exception
    ) -> list[Completion]:
        """After a step that failed: give up its only row, or try again with fewer rows."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if out_of_memory and self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        live = [row for row in rows if row not in admitted]
        self._scheduler.live = live
        if len(rows) == 1:
            return [self._give_up(rows[0], error)]
        if out_of_memory:
            self.oom_splits += 1
            for row in rows:
                row.oom_splits += 1
            self._scheduler.lower_limits(len(rows))
        retried = list(admitted) or live[len(live) // 2 :]
        self._scheduler.requeue(retried, alone=not out_of_memory)
        return []

    def _give_up(self, row: DecodeRow, error: Exception) -> Completion:
        """Finish a row that failed alone; its failure says nothing about the limits of others."""
        self._scheduler.release(row)
        self._scheduler.live = []
        self._scheduler.reset_limits()
        times = (row.prefill_ns, row.generate_ns)
        return Completion(row.tag, (), "error", *times, error, oom_splits=row.oom_splits)


def _chunk(row: DecodeRow) -> Chunk:
    """A live row's sequence in the next step."""
    new = 1 if row.tokens else len(row.prompt) - row.cached
    return Chunk(row.start, row.cached + new, new)


def _graph_row(row: DecodeRow) -> GraphRow:
    """A live row's state before a burst."""
    done = len(row.tokens)
    return GraphRow(
        token=row.tokens[-1],
        position=row.next_position + done - 1,
        start=row.start,
        length=row.cached,
        sampling=row.sampling,
        numbers=tuple(row.numbers[done:]),
        had=row.had,
    )


def _penalised(rows: Sequence[DecodeRow], logits: Tensor) -> Tensor:
    """The rows' logits, with the repetition penalty of those that have one."""
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

"""`CudaGraphRunner`: several decoding steps of the same rows, without waiting for the host.

On a GPU a decoding step is many small kernels. Launching them from Python takes longer than they
run, and checking after every step which rows have ended stops the device each time. So a burst
keeps its rows' state (token, position, slot, length) on the device, runs a fixed number of steps,
and only then copies all tokens to the host; tokens behind a row's end are thrown away. The step is
recorded once as a CUDA graph for each `GraphShape`, and replayed. Only one of these graphs runs at
a time, and results that outlive a step are kept elsewhere, so the graphs may share one memory pool.

The same code without a graph runs on any device, which is how it is tested.

Not covered: rows that join within a burst.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gc2ray.core.config.generation import GenerationConfig
from gc2ray.engine.decoding.sampler import NOT_FINITE, Repetition, most_likely, sample
from gc2ray.models.layers.attention import Attend, Step
from gc2ray.models.llama import LanguageModel

WARM_UPS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphRow:
    """A row as the host knows it before a burst.

    Attributes:
        token: Its last token, which is not in the KV cache yet.
        position: Position of that token.
        start: Its first slot.
        length: Its tokens in the KV cache.
        sampling: How its tokens are sampled.
        numbers: Random numbers for its next tokens, one a step; empty for a greedy row.
        had: Tokens that the repetition penalty applies to.
    """

    token: int
    position: int
    start: int
    length: int
    sampling: GenerationConfig
    numbers: tuple[float, ...] = ()
    had: tuple[int, ...] = ()


@dataclass(frozen=True)
class GraphShape:
    """Sizes that a recorded step is made for.

    Attributes:
        rows: Largest number of rows.
        longest: Largest number of tokens of a row.
        draws: Whether some rows are sampled.
        penalises: Whether some rows have a repetition penalty.
    """

    rows: int
    longest: int
    draws: bool
    penalises: bool = False

    @staticmethod
    def from_counts(rows: int, longest: int, *, draws: bool, penalises: bool = False) -> GraphShape:
        """The next larger of a few shapes, so that few steps are recorded."""
        return GraphShape(_rounded(rows, 1), _rounded(longest, 512), draws, penalises)


def _rounded(number: int, least: int) -> int:
    """The next power of two, or one and a half times one."""
    size = least
    while size < number:
        if size >= 8 and size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size


class CudaGraphRunner:
    """Steps of up to `shape.rows` rows.

    Args:
        model: The language model.
        kv_states: Keys and values of the KV cache. The first slot belongs to no row: rows that are
            missing write there.
        attend: Attention that works on tensors alone: `attend_varlen` or `attend_padded`.
        shape: Sizes of the batch.
        steps: Most steps of a burst.
        graph_pool: Memory shared with graphs of other shapes; None for memory of its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv_states: Tensor,
        attend: Attend,
        shape: GraphShape,
        steps: int,
        graph_pool: Any = None,
    ) -> None:
        device, rows = kv_states.device, shape.rows
        self._graph_pool = graph_pool
        self._model, self._attend, self._shape = model, attend, shape
        self._batch = Step.from_sizes(rows, shape.longest, kv_states)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._sampled = torch.zeros(rows, dtype=torch.bool, device=device)
        self._settings = torch.ones(2, rows, 1, dtype=torch.float64, device=device)
        self._numbers = torch.zeros(steps, rows, 1, dtype=torch.float64, device=device)
        self._written = torch.zeros(steps, rows, dtype=torch.int64, device=device)
        counted = model.vocabulary if shape.penalises else 0
        self._repetition = Repetition.none(rows, counted, device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = False

    @torch.inference_mode()
    def run(self, rows: Sequence[GraphRow], steps: int) -> list[list[int]]:
        """The next `steps` tokens of every row; what follows a `NOT_FINITE` means nothing."""
        self._load(rows, steps)
        for _ in range(steps):
            self._advance()
        written: list[list[int]] = self._written[:steps, : len(rows)].T.tolist()
        return written

    def _load(self, rows: Sequence[GraphRow], steps: int) -> None:
        if self._batch.kv_states.is_cuda and not self._tried:
            self._record()
            self._tried = True  # only now: a step that ran out of memory may be recorded later
        missing = self._shape.rows - len(rows)
        state = torch.tensor(
            [[row.token, row.position, row.start, row.length + 1] for row in rows]
            + [[0, 0, 0, 1]] * missing
        ).to(self._tokens.device)
        self._tokens.copy_(state[:, 0])
        self._positions.copy_(state[:, 1])
        self._batch.starts[:-1].copy_(state[:, 2])
        self._batch.used.copy_(state[:, 3])
        self._batch.slots.copy_(state[:, 2] + state[:, 3] - 1)
        self._step.zero_()
        if self._shape.draws:
            self._load_sampling(rows, steps)
        if self._shape.penalises:
            self._repetition.load([row.sampling for row in rows], [row.had for row in rows])

    def _load_sampling(self, rows: Sequence[GraphRow], steps: int) -> None:
        for index, row in enumerate(rows):
            is_sampled = row.sampling.temperature > 0
            self._sampled[index] = is_sampled
            if is_sampled:
                self._settings[0, index] = row.sampling.temperature
                self._settings[1, index] = row.sampling.top_p
                numbers = torch.tensor(row.numbers[:steps], dtype=torch.float64)
                self._numbers[: len(numbers), index, 0] = numbers.to(self._numbers.device)

    def _advance(self) -> None:
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def _compute(self) -> None:
        """One step, on the device alone: nothing here may read a value back."""
        batch = self._batch
        hidden = self._model.embed(self._tokens)
        logits = self._model.logits(hidden, self._positions, batch, self._attend)
        if self._shape.penalises:
            logits = self._repetition.applied(logits)
        tokens, finite = most_likely(logits)
        if self._shape.draws:
            numbers = self._numbers.index_select(0, self._step)[0]
            temperature, top_p = self._settings
            sampled = sample(logits, temperature, top_p, numbers)
            tokens = torch.where(self._sampled, sampled, tokens)
        self._tokens.copy_(tokens)
        if self._shape.penalises:
            self._repetition.add(tokens)
        self._written.index_copy_(0, self._step, tokens.where(finite, NOT_FINITE)[None])
        # Rows that are missing stay at the slot that belongs to no row.
        is_row = batch.starts[:-1] > 0
        self._positions.add_(is_row)
        batch.slots.add_(is_row)
        batch.used.add_(is_row)
        self._step.add_(1).clamp_max_(len(self._written) - 1)

    def _record(self) -> None:
        """Warm up beside the main stream, as recording requires, then record."""
        stream = torch.cuda.Stream(self._tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute()
        torch.cuda.current_stream(self._tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # The vision side runs meanwhile on its own thread, so only this one is captured.
            with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                self._compute()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            log.warning(
                "a decoding step cannot be recorded as a CUDA graph, which makes it slower: %s",
                error,
            )
            return
        self._graph = graph

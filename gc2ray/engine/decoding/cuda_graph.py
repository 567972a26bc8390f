"""`CudaGraphRunner`: several decode steps of the same rows, without a word between device and host.

On a GPU a step of decoding is many small kernels. Launching them from Python takes longer than they
run, and asking after every step which rows have ended stops the device each time. So a burst keeps
its rows' state (token, position, place, length) on the device, does a fixed number of steps, and
only then tells the host all tokens; what a row wrote behind its end is thrown away. The step is
recorded once as a CUDA graph for each number of rows, and replayed. As no two of these run at a
time, and what outlives a step is kept elsewhere, their graphs may share one pool of memory.

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
from gc2ray.models.layers.attention import Attend
from gc2ray.models.llama import LanguageModel

WARM_UPS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GraphRow:
    """A row as the host knows it before a burst.

    Attributes:
        token: Its last one, not yet in the arena.
        position: Of that token.
        start: Its first place in the arena.
        length: Its tokens in the arena.
        sampling: How it draws.
        numbers: What it draws its next tokens with, one a step; empty where it is greedy.
        had: Tokens that it is to repeat less.
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
    """What a recorded step is made for: at most so many rows and tokens of a row.

    Attributes:
        rows: Rows at most.
        longest: Tokens of a row at most.
        draws: Some rows are sampled.
        penalises: Some rows are to repeat themselves less.
    """

    rows: int
    longest: int
    draws: bool
    penalises: bool = False

    @staticmethod
    def from_counts(rows: int, longest: int, *, draws: bool, penalises: bool = False) -> GraphShape:
        """The next larger one of a few, so that few are recorded."""
        return GraphShape(_rounded(rows, 1), _rounded(longest, 512), draws, penalises)


def _rounded(number: int, least: int) -> int:
    """The next power of two, or one and a half times one."""
    size = least
    while size < number:
        if size >= 8 and size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size


class _GraphBatch:
    """The rows of a burst as attention sees them; see `attention.Sequences`."""

    def __init__(self, arena: Tensor, shape: GraphShape) -> None:
        device, rows = arena.device, shape.rows
        self.arena = arena
        self.places = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last = torch.arange(rows, device=device)
        self.starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.used = torch.ones(rows, dtype=torch.int32, device=device)
        self.query_ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.most_new = 1
        self.most_used = shape.longest

    @property
    def only_last(self) -> _GraphBatch:
        return self


class CudaGraphRunner:
    """Steps of up to `shape.rows` rows.

    Args:
        model: What decodes.
        arena: Where keys and values are. Its first place belongs to nobody: rows that are missing
            write there.
        attend: Works on tensors alone: `attend_varlen` or `attend_padded`.
        shape: What for.
        steps: Most steps of a burst.
        graph_pool: Memory that graphs of other shapes use, too; None for its own.
    """

    def __init__(
        self,
        model: LanguageModel,
        arena: Tensor,
        attend: Attend,
        shape: GraphShape,
        steps: int,
        graph_pool: Any = None,
    ) -> None:
        device, rows = arena.device, shape.rows
        self._graph_pool = graph_pool
        self._model, self._attend, self._shape = model, attend, shape
        self._slots = _GraphBatch(arena, shape)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self._sampled = torch.zeros(rows, dtype=torch.bool, device=device)
        self._heat = torch.ones(2, rows, 1, dtype=torch.float64, device=device)
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
        if self._slots.arena.is_cuda and not self._tried:
            self._record()
            self._tried = True  # not before: what was short of memory may be recorded next time
        missing = self._shape.rows - len(rows)
        state = torch.tensor(
            [[row.token, row.position, row.start, row.length + 1] for row in rows]
            + [[0, 0, 0, 1]] * missing
        ).to(self._tokens.device)
        self._tokens.copy_(state[:, 0])
        self._positions.copy_(state[:, 1])
        self._slots.starts[:-1].copy_(state[:, 2])
        self._slots.used.copy_(state[:, 3])
        self._slots.places.copy_(state[:, 2] + state[:, 3] - 1)
        self._step.zero_()
        if self._shape.draws:
            self._load_drawing(rows, steps)
        if self._shape.penalises:
            self._repetition.load([row.sampling for row in rows], [row.had for row in rows])

    def _load_drawing(self, rows: Sequence[GraphRow], steps: int) -> None:
        for index, row in enumerate(rows):
            hot = row.sampling.temperature > 0
            self._sampled[index] = hot
            if hot:
                self._heat[0, index] = row.sampling.temperature
                self._heat[1, index] = row.sampling.top_p
                numbers = torch.tensor(row.numbers[:steps], dtype=torch.float64)
                self._numbers[: len(numbers), index, 0] = numbers.to(self._numbers.device)

    def _advance(self) -> None:
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def _compute(self) -> None:
        """One step, on the device alone: nothing here may ask for a value."""
        slots = self._slots
        hidden = self._model.embed(self._tokens)
        logits = self._model.logits(hidden, self._positions, slots, self._attend)
        if self._shape.penalises:
            logits = self._repetition.applied(logits)
        tokens, finite = most_likely(logits)
        if self._shape.draws:
            numbers = self._numbers.index_select(0, self._step)[0]
            heat, top_p = self._heat[0], self._heat[1]
            tokens = torch.where(self._sampled, sample(logits, heat, top_p, numbers), tokens)
        self._tokens.copy_(tokens)
        if self._shape.penalises:
            self._repetition.add(tokens)
        self._written.index_copy_(0, self._step, tokens.where(finite, NOT_FINITE)[None])
        # Rows that are missing stay where they are, at the place that belongs to nobody.
        there = slots.starts[:-1] > 0
        self._positions.add_(there)
        slots.places.add_(there)
        slots.used.add_(there)
        self._step.add_(1).clamp_max_(len(self._written) - 1)

    def _record(self) -> None:
        """Warm up beside the main stream, as recording asks for, then record."""
        stream = torch.cuda.Stream(self._tokens.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._tokens.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._compute()
        torch.cuda.current_stream(self._tokens.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # The vision side goes on meanwhile, on its own thread: only this one is watched.
            with torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                self._compute()
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            log.warning("a step cannot be recorded, and is launched kernel by kernel: %s", error)
            return
        self._graph = graph

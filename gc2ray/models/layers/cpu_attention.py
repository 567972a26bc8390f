"""`CompiledAttention`: attention of packed float32 sequences on CPUs with AVX2, compiled from C.

Profiled on an AMD EPYC with AVX2, one thread: torch's fused attention computes a view of 577 tokens
at six tenths of the speed of a large product and a prompt of 300 at a third, and reads keys and
values of a decoding step at half the speed of memory, one sequence per call. This takes all
sequences of a step, or all views of a batch, in one call. Against torch's (`jobs.bench --only
attention`): 1.3x for views of 577 tokens, 2.1x for prompts of 300 tokens and 1.3x for 2,900, 1.9x
for 32 rows that decode. Answering end to end at retention 0.1 takes 0.88 of the time (7 pairs).

The code is in `cpu_attention.c`, which is built when gc2ray is installed, if there is a compiler;
else `compiled_kernel` returns None and the callers use torch's attention. Threads are those of
OpenMP, which torch has loaded already, so both use the same ones.

Not covered: other dtypes, devices and processors, masks other than causal and a window, dropout.
With AVX-512 torch's own kernels are wider: on an Intel Xeon (Sapphire Rapids, one thread,
2026-11-27) this is 0.7x as fast as torch's for views and for prompts of 2,900 tokens, 1.0x for 700,
1.2x for 300 and 1.35x for 32 rows that decode; it is not used there.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LIBRARY = "gc2ray.models.layers._cpu_attention"
TILE = 16
"""A head's features must be a multiple of it."""


class _Heads(ctypes.Structure):
    """Addresses of the features of each head's tokens: `Heads` in C."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )

    @staticmethod
    def from_tensor(states: Tensor) -> _Heads:
        """The addresses within a tensor (heads, tokens, features)."""
        return _Heads(states.data_ptr(), states.stride(0), states.stride(1))


class _Attention(ctypes.Structure):
    """`Attention` in C."""

    _fields_ = (
        ("queries", _Heads),
        ("keys", _Heads),
        ("values", _Heads),
        ("out", _Heads),
        ("heads", ctypes.c_int64),
        ("shared", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("causal", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class SequenceTable:
    """Where sequences lie among the keys, and how many queries they have.

    Attributes:
        table: First key, number of keys, and number of queries of each sequence, int64 (S, 3).
            Queries belong to the last keys.
        queries: Queries of all sequences.
        stop: Index behind the last key of any sequence.
    """

    table: Tensor
    queries: int
    stop: int

    @staticmethod
    def from_sequences(sequences: Sequence[tuple[int, int, int]]) -> SequenceTable:
        """From first key, number of keys and number of queries of each sequence.

        Raises:
            ValueError: A sequence begins before the first key, or has no or more queries than keys.
        """
        for start, tokens, queries in sequences:
            if start < 0 or not 1 <= queries <= tokens:
                raise ValueError(f"{queries} queries of {tokens} tokens from {start} on")
        return SequenceTable(
            torch.tensor(sequences, dtype=torch.int64).reshape(-1, 3),
            sum(queries for _, _, queries in sequences),
            max((start + tokens for start, tokens, _ in sequences), default=0),
        )


@dataclass(frozen=True)
class MaskPattern:
    """The tokens that a query sees, and the scale of scores.

    Attributes:
        scale: Factor of the scores.
        causal: Whether a query sees no token behind it.
        window: Tokens that a query sees, itself included; None for all before it. Only with
            `causal`.

    Raises:
        ValueError: The window is below 1, or set without `causal`.
    """

    scale: float
    causal: bool = field(default=True, kw_only=True)
    window: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"a window of {self.window} tokens, causal: {self.causal}")


@dataclass(frozen=True, eq=False)
class CompiledAttention:
    """The compiled function; `compiled_kernel` returns it."""

    library: ctypes.CDLL

    def __call__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        sequences: SequenceTable,
        pattern: MaskPattern,
    ) -> Tensor:
        """Attention of sequences to themselves.

        A sequence's result depends neither on the others nor on the number of threads.

        Args:
            queries: (T, query heads, features): those of each sequence after those of the last.
            keys: (heads, tokens, features); consecutive query heads share one.
            values: (heads, tokens, features), like `keys`.
            sequences: Where the sequences lie among the keys.
            pattern: Which tokens queries see.

        Returns:
            (T, query heads, features).

        Raises:
            ValueError: Sizes, dtypes or memory layouts do not fit.
            torch.OutOfMemoryError: There is no memory for scores.
        """
        _check(queries, keys, values, sequences)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        heads, _, size = keys.shape
        attention = _Attention(
            _Heads.from_tensor(queries.transpose(0, 1)),
            _Heads.from_tensor(keys),
            _Heads.from_tensor(values),
            _Heads.from_tensor(out.transpose(0, 1)),
            heads,
            queries.shape[1] // heads,
            size,
            pattern.window or 0,
            pattern.causal,
            pattern.scale,
        )
        table, threads = sequences.table, torch.get_num_threads()
        if self.library.gc2ray_attend(
            ctypes.byref(attention), ctypes.c_void_p(table.data_ptr()), len(table), threads
        ):
            raise torch.OutOfMemoryError(f"no memory for scores of {sequences.queries} queries")
        return out


def compiled_kernel() -> CompiledAttention | None:
    """The compiled attention, or None if it was not built or is not for this processor."""
    return _loaded(torch.backends.cpu.get_cpu_capability(), LIBRARY)


def kernel_for(size: int, dtype: torch.dtype, device: torch.device) -> CompiledAttention | None:
    """The compiled attention if it supports such heads, or None.

    Args:
        size: Features of a head.
        dtype: Dtype of queries, keys and values.
        device: Their device.
    """
    suits = device.type == "cpu" and dtype == torch.float32 and size % TILE == 0
    return compiled_kernel() if suits else None


@cache
def _loaded(capability: str, name: str) -> CompiledAttention | None:
    """Load the library and log the result, once."""
    if capability != "AVX2":
        log.info("compiled attention is for AVX2, not %s: torch's is used", capability)
        return None
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        log.info("compiled attention was not built (is there a C compiler?): torch's is used")
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:  # built for another machine, or no OpenMP beside torch's
        log.warning("compiled attention cannot be loaded: %s; torch's is used", error)
        return None
    library.gc2ray_attend.restype = ctypes.c_int
    library.gc2ray_attend.argtypes = (
        ctypes.POINTER(_Attention),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
    )
    return CompiledAttention(library)


def _check(queries: Tensor, keys: Tensor, values: Tensor, sequences: SequenceTable) -> None:
    """Refuse tensors that the compiled code cannot read."""
    heads, tokens, size = keys.shape
    shapes = f"{list(queries.shape)}, {list(keys.shape)}, {list(values.shape)}"
    if keys.shape != values.shape or queries.shape[2] != size or queries.shape[1] % heads:
        raise ValueError(f"queries, keys and values do not belong together: {shapes}")
    if size % TILE:
        raise ValueError(f"heads of {size} features; a multiple of {TILE} is needed")
    if len(queries) != sequences.queries or sequences.stop > tokens:
        described = f"{sequences.queries} queries and {sequences.stop} keys"
        raise ValueError(f"{described} are described, there are {len(queries)} and {tokens}")
    for states in (queries, keys, values):
        if states.dtype != torch.float32 or states.device.type != "cpu" or states.stride(2) != 1:
            raise ValueError(
                f"{states.dtype} on {states.device} with strides {states.stride()}; needed are "
                "float32, the CPU, and features one after the other"
            )

"""The compiled attention: right against float64, blind to neighbours, refusing what it cannot."""

import itertools
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gc2ray.models.layers import cpu_attention as compiled_attention
from gc2ray.models.layers.attention import KvShape
from gc2ray.models.layers.attention_backends import Compiled, attend_by_row, choose_attention
from gc2ray.models.layers.cpu_attention import (
    CompiledAttention,
    MaskPattern,
    SequenceTable,
    compiled_kernel,
    kernel_for,
)

AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def attend() -> CompiledAttention:
    compiled = compiled_kernel()
    if compiled is None:
        pytest.skip("not built, or not for this processor")
    return compiled


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_tensor(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def right(
    queries: Tensor, keys: Tensor, values: Tensor, sequences: SequenceTable, pattern: MaskPattern
) -> Tensor:
    """In float64, one sequence after the other, with the whole mask."""
    shared = queries.shape[1] // len(keys)
    outputs, done = [], 0
    for start, tokens, new in sequences.table.tolist():
        own = queries[done : done + new].double().transpose(0, 1)
        k, v = (
            states[:, start : start + tokens].double().repeat_interleave(shared, 0)
            for states in (keys, values)
        )
        at, place = torch.arange(tokens - new, tokens)[:, None], torch.arange(tokens)[None]
        seen = (place <= at) if pattern.causal else torch.ones(new, tokens, dtype=torch.bool)
        if pattern.window is not None:
            seen &= place > at - pattern.window
        out = F.scaled_dot_product_attention(own, k, v, attn_mask=seen, scale=pattern.scale)
        outputs.append(out.transpose(0, 1))
        done += new
    return torch.cat(outputs)


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or shutil.which("cc") is None,
    reason="nothing is built here",
)
def test_setup_builds_the_kernel_that_is_loaded() -> None:
    """On processors that have no use for it, too: elsewhere the slower attention hides it."""
    assert find_spec(compiled_attention.LIBRARY) is not None


@pytest.mark.skipif(not AVX2 or shutil.which("cc") is None, reason="not for this machine")
def test_installing_builds_it_where_there_is_a_compiler() -> None:
    assert compiled_kernel() is not None


@pytest.mark.parametrize("size", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        MaskPattern(0.3),
        MaskPattern(0.3, window=1),
        MaskPattern(0.3, window=7),
        MaskPattern(0.3, window=33),
        MaskPattern(0.1, causal=False),
    ],
    ids=str,
)
def test_it_computes_what_float64_computes(
    attend: CompiledAttention, size: int, shared: int, pattern: MaskPattern
) -> None:
    lengths = [(1, 1), (5, 1), (8, 8), (16, 9), (17, 17), (25, 24), (70, 50), (330, 1), (600, 600)]
    starts = itertools.accumulate([3, *(tokens + 2 for tokens, _ in lengths)])
    sequences = SequenceTable.from_sequences(
        [(at, *length) for at, length in zip(starts, lengths, strict=False)]
    )
    keys, values = random_tensor(2, 2, sequences.stop + 5, size).unbind()
    queries = random_tensor(sequences.queries, 2 * shared, size, seed=1)
    out = attend(queries, keys, values, sequences, pattern)
    torch.testing.assert_close(
        out.double(), right(queries, keys, values, sequences, pattern), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("tokens", [*range(1, 50), 255, 256, 257, 272, 511, 513])
@pytest.mark.parametrize("part", ["whole", "last"])
def test_every_length_is_right(attend: CompiledAttention, tokens: int, part: str) -> None:
    sequences = SequenceTable.from_sequences([(0, tokens, tokens if part == "whole" else 1)])
    queries, keys, values = (
        random_tensor(sequences.queries, 1, 32),
        *random_tensor(2, 1, tokens, 32, seed=1),
    )
    for pattern in (MaskPattern(0.2), MaskPattern(0.2, causal=False)):
        out = attend(queries, keys, values, sequences, pattern)
        torch.testing.assert_close(
            out.double(), right(queries, keys, values, sequences, pattern), atol=1e-5, rtol=0
        )


def test_large_scores_neither_overflow_nor_vanish(attend: CompiledAttention) -> None:
    queries, (keys, values) = random_tensor(40, 2, 32) * 30, random_tensor(2, 2, 40, 32)
    sequences, pattern = SequenceTable.from_sequences([(0, 40, 40)]), MaskPattern(1.0)
    out = attend(queries, keys, values, sequences, pattern)
    torch.testing.assert_close(
        out.double(), right(queries, keys, values, sequences, pattern), atol=1e-4, rtol=0
    )


def test_tensors_may_have_any_strides_but_for_features(
    attend: CompiledAttention,
) -> None:
    """As a tower has them: tokens first, and several tensors in one."""
    joined = random_tensor(4 * 50, 3, 3, 32)
    queries, keys, values = joined.unbind(1)
    sequences, pattern = (
        SequenceTable.from_sequences([(view * 50, 50, 50) for view in range(4)]),
        MaskPattern(0.2, causal=False),
    )
    out = attend(queries, keys.transpose(0, 1), values.transpose(0, 1), sequences, pattern)
    plain = attend(
        queries.contiguous(),
        keys.transpose(0, 1).contiguous(),
        values.transpose(0, 1).contiguous(),
        sequences,
        pattern,
    )
    assert torch.equal(out, plain)


def test_a_sequence_depends_neither_on_neighbours_nor_on_position_nor_on_threads(
    attend: CompiledAttention, threads: None
) -> None:
    queries, keys, values = random_tensor(41, 4, 64), *random_tensor(2, 2, 90, 64, seed=1)
    wide = torch.full((2, 2, 500, 64), torch.nan)
    wide[0, :, 201:291], wide[1, :, 201:291] = keys, values
    wide[:, :, 10:20] = random_tensor(2, 2, 10, 64, seed=2)
    neighbour = random_tensor(3, 4, 64, seed=3)
    for window in (None, 30):
        for new in (41, 1):
            alone = attend(
                queries[:new],
                keys,
                values,
                SequenceTable.from_sequences([(0, 90, new)]),
                MaskPattern(0.1, window=window),
            )
            for count in (1, 2):
                torch.set_num_threads(count)
                together = attend(
                    torch.cat([neighbour, queries[:new], neighbour[:1]]),
                    wide[0],
                    wide[1],
                    SequenceTable.from_sequences([(10, 10, 3), (201, 90, new), (12, 8, 1)]),
                    MaskPattern(0.1, window=window),
                )
                assert torch.equal(together[3:-1], alone)
                assert together.isfinite().all(), "what lies beside a sequence came in"


@pytest.mark.parametrize("new", [1, 30])
def test_a_nan_stays_a_nan(attend: CompiledAttention, new: int) -> None:
    queries, (keys, values) = random_tensor(new, 1, 32), random_tensor(2, 1, 30, 32)
    keys[0, 4, 5] = torch.nan
    out = attend(
        queries,
        keys,
        values,
        SequenceTable.from_sequences([(0, 30, new)]),
        MaskPattern(0.2, causal=False),
    )
    assert out.isnan().all()


def test_no_sequence_gives_no_output(attend: CompiledAttention) -> None:
    out = attend(
        random_tensor(0, 2, 32),
        random_tensor(2, 8, 32),
        random_tensor(2, 8, 32),
        SequenceTable.from_sequences([]),
        MaskPattern(1.0),
    )
    assert out.shape == (0, 2, 32)


@pytest.mark.parametrize("sequence", [(-1, 5, 1), (0, 5, 6), (0, 5, 0)])
def test_impossible_sequences_are_refused(sequence: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="queries of 5 tokens"):
        SequenceTable.from_sequences([(0, 5, 5), sequence])


def test_impossible_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="a window of 0"):
        MaskPattern(1.0, window=0)
    with pytest.raises(ValueError, match="a window of 4 tokens, causal: False"):
        MaskPattern(1.0, causal=False, window=4)


@pytest.mark.parametrize(
    ("queries", "keys", "values", "trouble"),
    [
        (
            random_tensor(5, 3, 32),
            random_tensor(2, 9, 32),
            random_tensor(2, 9, 32),
            "belong together",
        ),
        (
            random_tensor(5, 2, 32),
            random_tensor(2, 9, 32),
            random_tensor(2, 8, 32),
            "belong together",
        ),
        (
            random_tensor(5, 2, 48),
            random_tensor(2, 9, 32),
            random_tensor(2, 9, 32),
            "belong together",
        ),
        (
            random_tensor(5, 2, 24),
            random_tensor(2, 9, 24),
            random_tensor(2, 9, 24),
            "multiple of 16",
        ),
        (
            random_tensor(4, 2, 32),
            random_tensor(2, 9, 32),
            random_tensor(2, 9, 32),
            "there are 4 and 9",
        ),
        (
            random_tensor(5, 2, 32),
            random_tensor(2, 7, 32),
            random_tensor(2, 7, 32),
            "there are 5 and 7",
        ),
        (
            random_tensor(5, 2, 32).half(),
            random_tensor(2, 9, 32),
            random_tensor(2, 9, 32),
            "float16",
        ),
        (
            random_tensor(5, 2, 64)[..., ::2],
            random_tensor(2, 9, 32),
            random_tensor(2, 9, 32),
            "strides",
        ),
    ],
)
def test_tensors_that_the_kernel_cannot_read_are_refused(
    attend: CompiledAttention, queries: Tensor, keys: Tensor, values: Tensor, trouble: str
) -> None:
    with pytest.raises(ValueError, match=trouble):
        attend(queries, keys, values, SequenceTable.from_sequences([(2, 6, 5)]), MaskPattern(1.0))


@pytest.mark.parametrize("missing", ["library", "processor", "right library"])
def test_without_the_kernel_torch_attention_is_used(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = "DEFAULT" if missing == "processor" else "AVX2"
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    if missing == "library":
        monkeypatch.setattr(compiled_attention, "LIBRARY", "gc2ray._not_built")
    elif missing == "right library":
        monkeypatch.setattr(compiled_attention, "LIBRARY", "gc2ray.core.errors")  # no machine code
    assert compiled_kernel() is None
    assert (
        choose_attention(KvShape(layers=1, heads=2, head_size=16), 2, torch.float32, CPU)
        is attend_by_row
    )


def test_the_decoder_takes_it_where_it_is_found(attend: CompiledAttention) -> None:
    mode = choose_attention(KvShape(layers=1, heads=2, head_size=16), 2, torch.float32, CPU)
    assert isinstance(mode, Compiled)
    assert mode.attend is attend, "looked for twice"


def test_it_is_found_for_float32_heads_on_a_cpu_alone() -> None:
    assert (kernel_for(32, torch.float32, CPU) is None) == (compiled_kernel() is None)
    assert kernel_for(24, torch.float32, CPU) is None
    assert kernel_for(32, torch.bfloat16, CPU) is None
    assert kernel_for(32, torch.float32, torch.device("meta")) is None

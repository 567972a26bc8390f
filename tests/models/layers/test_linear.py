"""Packed and padded linear layers compute what the model's own layers do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from gc2ray.models import loading
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.hf_reference import stock_generate
from gc2ray.models.layers.linear import FEW_ROWS, Linear, packed_module, rows_to_run

WIDTHS = ("AVX2", "AVX512")


@pytest.mark.parametrize("biased", [(), (16,), (16, 4)])
def test_packed_layers_compute_the_same(biased: tuple[int, ...]) -> None:
    layers = [nn.Linear(24, size, bias=size in biased) for size in (16, 8, 4)]
    packed = Linear.from_layers(*layers)
    inputs = torch.randn(3, 5, 24)
    with torch.inference_mode():
        wanted = [layer(inputs) for layer in layers]
        torch.testing.assert_close(packed(inputs), torch.cat(wanted, dim=-1))
        for found, want in zip(packed.each(inputs), wanted, strict=True):
            torch.testing.assert_close(found, want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [5, 200])
def test_layers_apply_product_and_shift(rows: int, *, bias: bool) -> None:
    layer, inputs = nn.Linear(24, 8, bias=bias), torch.randn(rows, 24)
    with torch.inference_mode():
        found = Linear.from_layers(layer, product=3.0, shift=0.5)(inputs)
        wanted = 3 * inputs @ layer.weight.t() + (0.5 * layer.bias if bias else 0)
    torch.testing.assert_close(found, wanted)


@given(st.integers(1, 10_000))
def test_padded_row_counts_are_few(rows: int) -> None:
    run = rows_to_run(rows)
    assert rows <= run <= rows * 1.34
    assert rows_to_run(run) == run
    assert rows <= 16 or run <= rows * 1.24
    assert rows <= 128 or run <= rows * 1.13
    assert rows <= 512 or run <= rows * 1.07


def test_at_most_a_few_kernels_are_compiled() -> None:
    kernels = {rows_to_run(rows) for rows in range(1, 4097)}
    assert len(kernels) == 2 + 3 * 2 + 3 * 4 + 2 * 8 + 3 * 16
    assert len([rows for rows in kernels if rows <= FEW_ROWS]) == 18, "all that AVX2 needs"


@pytest.mark.parametrize("capability", WIDTHS)
@pytest.mark.parametrize("shape", [(17, 24), (3, 11, 24), (1, 1, 24), (2, 300, 24)])
def test_padding_of_rows_changes_no_output(
    shape: tuple[int, ...], capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    layer = nn.Linear(24, 10)
    inputs = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(Linear.from_layers(layer)(inputs), layer(inputs))


def test_rows_are_padded_where_packed_layers_run(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear.from_layers(nn.Linear(8, 8))
    padded = {}
    for capability in WIDTHS:
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda it=capability: it)
        padded[capability] = [linear.rows_to_run(rows) for rows in (17, 1000)]
    assert padded == {"AVX2": [20, 1000], "AVX512": [20, 1024]}


def test_half_precision_is_not_packed() -> None:
    layer = nn.Linear(8, 8).to(torch.bfloat16)
    packed = Linear.from_layers(layer)
    assert not packed.packed
    assert packed.weights[0].data_ptr() == layer.weight.data_ptr(), "a copy nobody needs"


def test_a_packed_twin_leaves_the_module_alone() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    twin = packed_module(module)
    inputs = torch.randn(2, 8)
    with torch.inference_mode():
        torch.testing.assert_close(twin(inputs), module(inputs))
    assert twin is not module
    assert [type(m) for m in module.modules()].count(nn.Linear) == 2
    assert not any(isinstance(m, nn.Linear) for m in twin.modules())
    bare = nn.Sequential(nn.GELU(), nn.Tanh())
    assert packed_module(bare) is bare


@pytest.mark.parametrize("runs_first", ["twin", "model"])
def test_a_packed_twin_of_a_whole_model_generates(
    tiny_paths: dict[str, Path], runs_first: str
) -> None:
    """Both orders: transformers hooks a model's layers when it first runs."""
    path = str(tiny_paths["vicuna"])
    loaded = loading.load(path, revision=None, dtype="float32", device="cpu")
    twin = replace(loaded, model=packed_module(loaded.model))
    assert not any(isinstance(m, nn.Linear) for m in twin.model.modules())
    image = Image.effect_noise((200, 150), 80).convert("RGB")
    text = ChatPrompt(loaded.processor).render("What is it?")
    order = (twin, loaded, twin) if runs_first == "twin" else (loaded, twin, loaded)
    first, *others = [stock_generate(one, [image], [text], 8) for one in order]
    assert others == [first, first]

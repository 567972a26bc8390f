"""Fast linear layers: prepacked by oneDNN on a CPU in float32.

MKL, which torch uses for float32 there, holds back on processors that are not Intel's, and with few
rows on others too; oneDNN's kernels do not. Weights are reordered once, when a layer is packed, so
a packed layer is a copy: the model it came from stays unchanged and usable. Elsewhere (on GPUs, in
other dtypes, without oneDNN) a layer reads the model's own weights, as it does where that is as
fast: without AVX-512, from `FEW_ROWS` on.

Measured, one thread, (rows x in x out), plain against prepacked GFLOP/s: on an AMD EPYC with
AVX-512 (16 x 512 x 1376) 82 -> 194, (1024 x 512 x 1376) 88 -> 225, (16 x 512 x 32000) 48 -> 140; on
one with AVX2 only 49 -> 50, 86 -> 81, 26 -> 47. `jobs.bench` prints both for its machine.

oneDNN compiles a kernel for every number of rows that it meets, at 0.7 ms and up to several MiB
each (measured), and keeps the last thousand: with ragged batches a worker's memory grew by 0.2 MiB
a row. So rows are padded to few numbers (`rows_to_run`): on average to 1.08x up to 96 rows and to
1.02x up to 2048.

Not covered: bfloat16 on CPUs (oneDNN's gain is small there), quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 96
"""Up to here prepacked layers are at least as fast everywhere; measured at 32, 64, 128, 256."""


@dataclass(frozen=True, eq=False)
class Linear:
    """One or several linear layers on the same input.

    Attributes:
        sizes: Output features of each layer.
        weights: Weights of each layer, (out, in).
        biases: Biases of each layer; None for a layer without.
        packed: All weights prepacked in one, or None.
        joined: All biases in one, if packed.
        product: Factor of the products with weights.
        shift: Factor of the biases.
    """

    sizes: tuple[int, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    packed: Tensor | None = None
    joined: Tensor | None = None
    product: float = 1.0
    shift: float = 1.0

    @staticmethod
    def from_layers(*layers: nn.Linear, product: float = 1.0, shift: float = 1.0) -> Linear:
        """Pack layers where the machine can, else refer to them.

        Args:
            layers: Layers that have the same input.
            product: A factor of the products with the weights; it costs no pass over the outputs.
            shift: A factor of the biases.
        """
        sizes = tuple(layer.out_features for layer in layers)
        weights = tuple(layer.weight.detach() for layer in layers)
        biases = tuple(_bias(layer) for layer in layers)
        if not _can_pack(weights):
            return Linear(sizes, weights, biases, product=product, shift=shift)
        scaled = torch.cat(weights).mul_(product)
        packed = torch.ops.mkldnn._reorder_linear_weight(scaled, None)
        joined = _joined(biases, sizes, shift)
        return Linear(sizes, weights, biases, packed, joined, product, shift)

    def rows_to_run(self, rows: int) -> int:
        """Rows that are computed for `rows` rows, padding included; see the module."""
        return rows_to_run(rows) if self._runs_packed(rows) else rows

    def each(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output of `inputs` (T, in): (T, out)."""
        if self._runs_packed(inputs.shape[:-1].numel()):
            return torch.split(self(inputs), list(self.sizes), dim=-1)
        pairs = zip(self.weights, self.biases, strict=True)
        return tuple(self._plain(inputs, weight, bias) for weight, bias in pairs)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The layers' outputs side by side, (…, in) to (…, sum of out)."""
        rows = inputs.shape[:-1].numel()
        if not self._runs_packed(rows):
            outputs = self.each(inputs)
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        padding = self.rows_to_run(rows) - rows
        if not padding:
            return self._run(inputs)
        flat = F.pad(inputs.reshape(rows, -1), (0, 0, 0, padding))
        return self._run(flat)[:rows].view(*inputs.shape[:-1], -1)

    def _runs_packed(self, rows: int) -> bool:
        return self.packed is not None and (rows <= FEW_ROWS or _has_avx512())

    def _plain(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One layer by its own weights; BLAS multiplies by the factors as it writes."""
        if self.product == self.shift == 1:
            return F.linear(inputs, weight, bias)
        if bias is None:
            return F.linear(inputs, weight).mul_(self.product)
        flat = inputs.reshape(-1, inputs.shape[-1])
        made = torch.addmm(bias, flat, weight.t(), beta=self.shift, alpha=self.product)
        return made.view(*inputs.shape[:-1], -1)

    def _run(self, inputs: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.packed, self.joined, "none", [], ""
        )
        return made


def rows_to_run(rows: int) -> int:
    """The next larger of a few numbers of rows.

    There are 2 of them between two powers of two, 4 from 16 on, 8 from 128 on, 16 from 512 on. With
    few rows padding costs least, as reading the weights is most of the work.
    """
    if rows <= 2:
        return rows
    octave = (rows - 1).bit_length() - 1  # 2^octave < rows <= 2^(octave + 1)
    splits = 1 + (octave >= 4) + (octave >= 7) + (octave >= 9)
    step = 1 << (octave - splits)
    return -(-rows // step) * step


Replacement = Callable[[nn.Module], nn.Module | None]
"""Returns the replacement of a submodule, or None to pack the submodule itself."""


def packed_module(module: nn.Module, replacement: Replacement = lambda _: None) -> nn.Module:
    """A twin of a module whose linear layers are packed; it shares all other parameters with it.

    The twin of a whole model is a whole model: its `generate` works. Hooks put on one of them are
    not put on the other, except on submodules in which nothing is packed, which they share. Where
    nothing can be packed, the module itself is returned.

    Args:
        module: The module to pack.
        replacement: Called for every submodule with linear layers in it.
    """
    if not any(isinstance(m, nn.Linear) and _can_pack([m.weight]) for m in module.modules()):
        return module
    if isinstance(module, nn.Linear):
        return _PackedModule(module)
    return replacement(module) or _twin(module, replacement)


class _PackedModule(nn.Module):
    """A packed linear layer in the place of an `nn.Linear`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._linear = Linear.from_layers(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        return self._linear(inputs)


def _twin(module: nn.Module, replacement: Replacement) -> nn.Module:
    twin: Any = object.__new__(type(module))
    for name, value in module.__dict__.items():
        # Hooks are in dicts. transformers adds some at a model's first run; without copies it would
        # add the twin's to the module as well, whose layers would then be recorded twice.
        twin.__dict__[name] = copy(value) if isinstance(value, dict) else value
    twin._modules = {
        name: child if child is None else packed_module(child, replacement)
        for name, child in module._modules.items()
    }
    return twin  # type: ignore[no-any-return]  # as the type of `module`


def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _bias(layer: Any) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


def _can_pack(weights: Sequence[Tensor]) -> bool:
    on_cpu = all(w.device.type == "cpu" and w.dtype == torch.float32 for w in weights)
    return (
        on_cpu
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's is
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _joined(biases: Sequence[Tensor | None], sizes: Sequence[int], shift: float) -> Tensor | None:
    """One bias for layers packed together, times `shift`; those without one add nothing."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    parts = [
        present[0].new_zeros(size) if bias is None else bias
        for bias, size in zip(biases, sizes, strict=True)
    ]
    return torch.cat(parts).mul_(shift)

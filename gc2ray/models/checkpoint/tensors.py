"""Headers of a checkpoint's weight files: names, dtypes and shapes of its tensors.

Only headers are read, which takes milliseconds for weights of any size. Weights that cannot be
loaded correctly are refused, with the reason: pickles, files that are missing or cut short,
quantised weights, a tensor under two names.

Not covered: which tensors a model needs (`gc2ray.models.loading` checks that), and their values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gc2ray.core.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100_000_000
"""More is no header; safetensors itself refuses it."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
RENAMED = frozenset({"model", "language_model", "vision_model"})
"""Parts of names by which the layouts of transformers 4 and 5 differ."""
QUANTISED = frozenset({
    "SCB", "absmax", "g_idx", "input_scale", "nested_absmax", "nested_quant_map", "quant_map",
    "quant_state", "qweight", "qzeros", "scales", "weight_format", "weight_packed", "weight_scale",
    "weight_scale_inv", "weight_shape", "weight_zero_point",
})  # fmt: skip
"""Parts of names that bitsandbytes, GPTQ, AWQ, compressed-tensors and fp8 give to tensors."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file describes it.

    Attributes:
        kind: Dtype, as safetensors names it.
        shape: Shape of the tensor.
    """

    kind: str
    shape: tuple[int, ...]


def tensor_headers(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint, by name.

    Raises:
        ConfigError: There are no weights that can be loaded, or a file of them is damaged.
    """
    headers: dict[str, TensorHeader] = {}
    for path in _files(directory):
        headers |= _header(path)
    return headers


def check_named_once(directory: Path, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights in which a tensor is there under an old name and a new one.

    Raises:
        ConfigError: A tensor has two names, and either might be loaded.
    """
    names: dict[tuple[str, ...], str] = {}
    for name in sorted(headers):
        plain = tuple(part for part in name.split(".") if part not in RENAMED)
        other = names.setdefault(plain, name)
        if other != name:
            raise ConfigError(
                f"recipe.model.path: {directory} has a tensor twice, as {other} and as {name}; "
                "copy the model again, into an empty directory"
            )


def check_unquantised(directory: Path, headers: Mapping[str, TensorHeader]) -> None:
    """Refuse weights that were quantised, whatever the configuration says of them.

    Raises:
        ConfigError: Some tensors look quantised.
    """
    names = [name for name, header in sorted(headers.items()) if _looks_quantised(name, header)]
    if names:
        raise ConfigError(
            f"recipe.model.path: {directory} has quantised weights ({len(names)} tensors, the "
            f"first is {names[0]} of type {headers[names[0]].kind}), but its config.json has no "
            "quantization_config; quantised checkpoints are not supported: name the original"
        )


def table_rows(headers: Mapping[str, TensorHeader]) -> int | None:
    """Rows of the text table; None if there is not exactly one such tensor."""
    shapes = [headers[name].shape for name in headers if name.endswith("embed_tokens.weight")]
    return shapes[0][0] if len(shapes) == 1 and shapes[0] else None


def _files(directory: Path) -> list[Path]:
    """The files that transformers loads, in its order of preference.

    Raises:
        ConfigError: There are none, or not all.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise ConfigError(f"recipe.model.path: {directory} {_no_weights(directory)}")
    try:
        names = sorted({*json.loads((directory / INDEX).read_bytes())["weight_map"].values()})
        paths = [directory / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"recipe.model.path: {directory / INDEX} is no index of weights; copy the model again"
        ) from error
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise ConfigError(
            f"recipe.model.path: {directory} has no {gone[0]}, which is one of the "
            f"{len(names)} files that {INDEX} names; copy the model again"
        )
    return paths


def _no_weights(directory: Path) -> str:
    """Why there are no weights that can be loaded."""
    if any(directory.glob("*.safetensors")):
        return f"has weights, but neither {SINGLE} nor {INDEX}, which lists the files"
    if any(path for pattern in PICKLES for path in directory.glob(pattern)):
        return (
            "has its weights in pickles only, which may run code when they are opened and are "
            "never loaded; where they are trusted, convert them: load them with transformers' "
            "from_pretrained and write them with save_pretrained, which makes safetensors"
        )
    return f"has no weights: no {SINGLE} and no {INDEX}"


def _header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file.

    Raises:
        ConfigError: It is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        data = file.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        tensors = json.loads(data)
        tensors.pop("__metadata__", None)
        needed = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        headers = {name: _tensor(tensor) for name, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"recipe.model.path: {path} is not a safetensors file, or damaged; copy the model again"
        ) from error
    if size != 8 + length + needed:
        raise ConfigError(
            f"recipe.model.path: {path} is damaged: {size} bytes, and its header describes "
            f"{8 + length + needed}; copy the model again"
        )
    return headers


def _tensor(described: Mapping[str, Any]) -> TensorHeader:
    return TensorHeader(str(described["dtype"]), tuple(described["shape"]))


def _looks_quantised(name: str, header: TensorHeader) -> bool:
    if not QUANTISED.isdisjoint(name.split(".")):
        return True
    return name.endswith("weight") and header.kind not in FLOATS

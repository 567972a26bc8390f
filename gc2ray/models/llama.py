"""`LanguageModel`: a transformers language model, run over packed tokens of many sequences.

Llama, Mistral, Qwen2, Qwen3 and Granite have the same layers with different sizes: normalise,
attend, add, normalise, feed forward, add; rotary positions, grouped key-value heads, biases and
sliding windows as the config says. Qwen3 also normalises each head's query and key before it is
turned by its position, and Granite multiplies embeddings, residual branches and logits by constants
of its config. The modules' own weights are used. Compared with running the modules:

* tokens of all sequences are packed, (T, D), so that no sequence is padded to another's length;
* keys and values go to slots of a KV cache that the caller chose, and positions are explicit;
* the last layer computes queries, attention output and feed-forward only for tokens whose logits
  are needed; with 8 layers that saves a tenth of a prefill;
* key and value projections are one product, as are gate and up, where layers are packed.

The model itself is read, never changed.

Not covered: rotary frequencies that depend on the sequence's length ("longrope"; "dynamic" is
covered up to `max_position_embeddings`, where it is the default), layers with experts (Qwen3-MoE,
GPT-OSS), other architectures: `unsupported` gives the reason, and the engine then decodes with
stock `generate`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gc2ray.models.layers.attention import Attend, KvShape, Step, write
from gc2ray.models.layers.linear import Linear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "granite")
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
"""`dynamic`, which InternVL3 has, changes frequencies behind `max_position_embeddings` only, and
gc2ray answers no prompt that would get there."""
TEXT_MODELS = ("language_model", "text_model")
"""What models of images and text call their language model; the second are Idefics3 and SmolVLM."""


@dataclass(frozen=True, eq=False)
class _Norm:
    """A root-mean-square norm's weight and epsilon."""

    weight: Tensor
    epsilon: float

    @staticmethod
    def from_module(module: Any) -> _Norm:
        return _Norm(module.weight.detach(), float(module.variance_epsilon))

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True, eq=False)
class _Layer:
    """One decoder layer.

    The norms of queries and keys are None where the model has none, and so is the factor of the
    residual branches: most models then save a pass.
    """

    index: int
    before: _Norm
    query: Linear
    query_norm: _Norm | None
    key_value: Linear
    key_norm: _Norm | None
    output: Linear
    after: _Norm
    gate_up: Linear
    activation: Any
    down: Linear
    head_size: int
    scale: float
    window: int | None
    residual_factor: float | None

    @staticmethod
    def from_module(index: int, module: Any, config: Any) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        return _Layer(
            index=index,
            before=_Norm.from_module(module.input_layernorm),
            query=Linear.from_layers(attention.q_proj),
            query_norm=_head_norm(attention, "q_norm"),
            key_value=Linear.from_layers(attention.k_proj, attention.v_proj),
            key_norm=_head_norm(attention, "k_norm"),
            output=Linear.from_layers(attention.o_proj),
            after=_Norm.from_module(module.post_attention_layernorm),
            gate_up=Linear.from_layers(mlp.gate_proj, mlp.up_proj),
            activation=_activation(mlp.act_fn, config),
            down=Linear.from_layers(mlp.down_proj),
            head_size=int(attention.head_dim),
            scale=float(attention.scaling),
            window=_window(attention, config),
            residual_factor=_factor(module, "residual_multiplier"),
        )

    def attended(self, hidden: Tensor, rotary: _Rotary, step: Step, attend: Attend) -> Tensor:
        """(T, D) to (T, D): attention and its residual."""
        normed = self.before(hidden)
        self._write(normed, rotary, step)
        queries = self._queries(normed, rotary)
        out = attend(step, self.index, queries, self.scale, self.window).flatten(1)
        return self._added(self.output(_padded(out, len(hidden))), hidden)

    def attended_last(self, hidden: Tensor, rotary: _Rotary, step: Step, attend: Attend) -> Tensor:
        """(T, D) to (S, D): like `attended`, for each sequence's last token only."""
        normed = self.before(hidden)
        self._write(normed, rotary, step)
        queries = self._queries(normed[step.last], rotary.at(step.last))
        out = attend(step.only_last, self.index, queries, self.scale, self.window)
        return self._added(self.output(out.flatten(1)), hidden[step.last])

    def _write(self, normed: Tensor, rotary: _Rotary, step: Step) -> None:
        """Put keys and values into the KV cache; rows behind the tokens are padding."""
        size = (len(rotary.cos), -1, self.head_size)
        key, value = (part[: size[0]].view(size) for part in self.key_value.each(normed))
        write(step, self.index, rotary.turned(_normed(key, self.key_norm)), value)

    def _queries(self, normed: Tensor, rotary: _Rotary) -> Tensor:
        """(T, heads, head size)."""
        size = (len(rotary.cos), -1, self.head_size)
        query = self.query(normed)[: size[0]].view(size)
        return rotary.turned(_normed(query, self.query_norm))

    def fed_forward(self, hidden: Tensor) -> Tensor:
        """(T, D) to (T, D): the feed-forward part and its residual."""
        gate, up = self.gate_up.each(self.after(hidden))
        # In place: the products' outputs are not used elsewhere, and new memory has to be cleared.
        return self._added(self.down(self.activation(gate).mul_(up)), hidden)

    def _added(self, made: Tensor, hidden: Tensor) -> Tensor:
        """What a residual branch made, in place, with the states that it began from."""
        if self.residual_factor is not None:
            made.mul_(self.residual_factor)
        return made.add_(hidden)


@dataclass(frozen=True, eq=False)
class _Rotary:
    """Cosines and sines of positions, (T, 1, head size) each."""

    cos: Tensor
    sin: Tensor

    def at(self, tokens: Tensor) -> _Rotary:
        """Cosines and sines of some of the tokens."""
        return _Rotary(self.cos[tokens], self.sin[tokens])

    def turned(self, states: Tensor) -> Tensor:
        """Queries or keys (T, heads, head size) turned by their positions."""
        half = states.shape[-1] // 2
        low, high = states[..., :half], states[..., half:]
        turned = states * self.cos
        turned[..., :half].addcmul_(high, self.sin[..., :half], value=-1)
        turned[..., half:].addcmul_(low, self.sin[..., half:])
        return turned


class LanguageModel:
    """The language model of a transformers model.

    Args:
        model: A causal language model, or an image-text-to-text model with one inside.

    Raises:
        ValueError: The model is not supported; see `unsupported`.
    """

    def __init__(self, model: Any) -> None:
        reason = unsupported(model)
        if reason is not None:
            raise ValueError(reason)
        text = _text_model(model)
        config = text.config
        self.device: torch.device = text.norm.weight.device
        self.dtype: torch.dtype = text.norm.weight.dtype
        self._table = text.embed_tokens
        self._input_factor = _factor(text, "embedding_multiplier")
        self._rotary = _rotary(text)
        self._layers = [_Layer.from_module(i, layer, config) for i, layer in enumerate(text.layers)]
        self._norm = _Norm.from_module(text.norm)
        self._head = Linear.from_layers(model.lm_head)
        self._logits_divisor = _logits_divisor(model, text)
        self.kv_shape = KvShape(
            layers=len(self._layers),
            heads=int(config.num_key_value_heads),
            head_size=self._layers[0].head_size,
        )
        self.heads = int(config.num_attention_heads)
        self.vocabulary = len(model.lm_head.weight)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings (T, D) of token ids (T,), as the table has them."""
        embedded: Tensor = self._table(token_ids)
        return embedded

    def logits(self, hidden: Tensor, positions: Tensor, step: Step, attend: Attend) -> Tensor:
        """Logits of the token after each sequence, (S, vocabulary).

        Args:
            hidden: Embeddings of the new tokens, (T, D), as the table has them: factors of the
                model's own are applied here, to images as to text.
            positions: Positions of the new tokens, int64 (T,).
            step: The sequences of the new tokens; their keys and values are written.
            attend: How attention is computed.
        """
        cos, sin = self._rotary(hidden, positions[None])
        rotary = _Rotary(cos[0, :, None], sin[0, :, None])
        if self._input_factor is not None:
            hidden = hidden * self._input_factor
        # Padded once, rather than in every layer.
        hidden = _padded(hidden, self._head.rows_to_run(len(hidden)))
        for layer in self._layers[:-1]:
            hidden = layer.fed_forward(layer.attended(hidden, rotary, step, attend))
        last = self._layers[-1]
        hidden = last.fed_forward(last.attended_last(hidden, rotary, step, attend))
        logits = self._head(self._norm(hidden))
        return logits if self._logits_divisor is None else logits.div_(self._logits_divisor)


def _rotary(text: Any) -> Any:
    """The module that makes cosines and sines of positions.

    That of `dynamic` looks at the positions of every step, for which a GPU would have to wait; a
    twin of it does not.
    """
    if text.rotary_emb.rope_type != "dynamic":
        return text.rotary_emb
    twin = copy(text.rotary_emb)
    twin._buffers = dict(twin._buffers)
    twin.rope_type = "default"
    return twin


def _activation(module: Any, config: Any) -> Any:
    """A layer's activation; SiLU, the usual one, overwrites its input."""
    return nn.SiLU(inplace=True) if config.hidden_act in ("silu", "swish") else module


def _head_norm(attention: Any, name: str) -> _Norm | None:
    """The norm of each head's queries or keys, where the model has one."""
    module = getattr(attention, name, None)
    return None if module is None else _Norm.from_module(module)


def _normed(heads: Tensor, norm: _Norm | None) -> Tensor:
    """Queries or keys (T, heads, head size), normalised where the model does."""
    return heads if norm is None else norm(heads)


def _factor(module: Any, name: str) -> float | None:
    """A factor that a module applies, or None where it has none or it changes nothing."""
    factor = float(getattr(module, name, 1.0))
    return None if factor == 1 else factor


def _logits_divisor(model: Any, text: Any) -> float | None:
    """What logits are divided by.

    transformers divides Granite's in the class of the language model only, not in those of images
    and text with a Granite inside.
    """
    return _factor(text.config, "logits_scaling") if text is model.model else None


def _padded(states: Tensor, rows: int) -> Tensor:
    """(T, D) to (rows, D), zeros behind."""
    return states if len(states) == rows else F.pad(states, (0, 0, 0, rows - len(states)))


def unsupported(model: Any) -> str | None:
    """Why `LanguageModel` cannot run a model, or None if it can."""
    config: Any = getattr(_text_model(model), "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODEL_TYPES:
        return f"the language model is {kind}; supported: {', '.join(MODEL_TYPES)}"
    rope = config.rope_parameters.get("rope_type", "default")
    if rope not in ROPE_TYPES:
        return f"its rotary positions are {rope!r}; supported: {', '.join(ROPE_TYPES)}"
    return None


def _text_model(model: Any) -> Any:
    inner = getattr(model, "model", None)
    named = (getattr(inner, name, None) for name in TEXT_MODELS)
    return next((text for text in named if text is not None), inner)


def _window(attention: Any, config: Any) -> int | None:
    """Tokens that a query of this layer sees; Qwen2 sets them per layer, Mistral once."""
    if hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:
        window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    return None if window is None else int(window)

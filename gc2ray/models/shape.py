"""`ModelShape`: the sizes of a model, and the operations and memory that follow from them.

These are formulas over sizes in a model's config; no weights are needed. All numbers are integers,
so that costs of rows add up exactly, in any order. The counts over whole answers are in
`gc2ray.models.flops`.

Not covered: feed-forward layers without a gate or with experts, sliding windows (counted as if a
query saw every token before it), quantised weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

CLASS_TOKEN_TOWERS = frozenset({"clip_vision_model", "internvl_vision"})
"""Model types of towers with a class token beside the patches."""


GPU_TOWER_VIEWS, CPU_TOWER_VIEWS = 32, 8
"""Views that go through the vision tower at once; bounds its activations.

On a CPU few are faster, as activations stay in its caches (5 layers of width 96, 40 views: 1.1 s
with 2 to 16 at once, 1.3 s with 40; with two threads 0.70 s with 4, 0.65 s with 5 to 16).
"""


def causal_pairs(length: int) -> int:
    """Pairs of a query and a key that it sees, in a sequence read from its beginning."""
    return length * (length + 1) // 2


@dataclass(frozen=True)
class TextModel:
    """A language model with gated feed-forward layers.

    Attributes:
        layers: Decoder layers.
        width: Width of the hidden states.
        queries: Width of all query heads together.
        keys: Width of all key heads together, and of all value heads; less than `queries` where
            query heads share them (grouped-query attention).
        ffn: Width of the feed-forward layers.
        vocabulary: Tokens of the vocabulary.
        heads: Query heads.
        biases: Whether query, key and value layers have them.
        tied: Whether the text table is the output layer, too.
        max_positions: Longest prompt and answer, in tokens.
        output_biases: Whether the layers behind attention have them.
        ffn_biases: Whether the feed-forward layers have them.
        head_norms: Whether each head's queries and keys are normalised.
    """

    layers: int
    width: int
    queries: int
    keys: int
    ffn: int
    vocabulary: int
    heads: int = 1
    biases: bool = False
    tied: bool = False
    max_positions: int = 0
    output_biases: bool = False
    ffn_biases: bool = False
    head_norms: bool = False

    @staticmethod
    def from_config(config: Any) -> TextModel:
        """From a transformers config of the Llama kind, or of a model of images and text with one.

        The outermost config says whether the text table is tied, as in transformers: that of the
        language model inside may say something else.
        """
        text = getattr(config, "text_config", config)
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        attention_bias = bool(getattr(text, "attention_bias", False))
        return TextModel(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            queries=head * heads,
            keys=head * key_heads,
            ffn=text.intermediate_size,
            vocabulary=text.vocab_size,
            heads=heads,
            biases=attention_bias or text.model_type == "qwen2",
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            max_positions=int(getattr(text, "max_position_embeddings", 0)),
            output_biases=attention_bias,
            ffn_biases=bool(getattr(text, "mlp_bias", False)),
            head_norms=text.model_type == "qwen3",
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of one decoder layer."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + 3 * self.width * self.ffn

    @property
    def head_weights(self) -> int:
        """Weights of the layer that makes logits."""
        return self.width * self.vocabulary

    @property
    def step_weights(self) -> int:
        """Weights that a step reads at least; of the text table it reads a few rows."""
        return self.layers * self.layer_weights + self.head_weights

    @property
    def parameters(self) -> int:
        """All parameters: linear layers, two norms a layer and one behind, tables."""
        biases = self.biases * (self.queries + 2 * self.keys) + self.output_biases * self.width
        biases += self.ffn_biases * (2 * self.ffn + self.width)
        head_norms = self.head_norms * 2 * (self.queries // self.heads)
        layer = self.layer_weights + 2 * self.width + biases + head_norms
        tables = self.head_weights * (1 if self.tied else 2)
        return self.layers * layer + self.width + tables

    @property
    def cached_numbers(self) -> int:
        """Numbers of one token's keys and values over all layers."""
        return 2 * self.layers * self.keys

    def prefill(self, length: int, shared: int = 0) -> int:
        """Operations of a prompt up to its first new token, all layers for all tokens.

        Args:
            length: Tokens of the prompt.
            shared: Tokens at its beginning whose keys and values are in the cache already.
        """
        new = length - shared
        linear = self.layers * self.layer_weights * new + self.head_weights
        pairs = causal_pairs(length) - causal_pairs(shared)
        return 2 * linear + self.layers * self._attention(pairs)

    def needed_prefill(self, length: int, shared: int = 0) -> int:
        """Operations of a prompt without results of the last layer that are not used.

        That layer computes keys and values of all tokens, and the rest for the last one only.
        """
        new = length - shared
        keys_and_values = 2 * self.width * self.keys
        not_needed = 2 * (self.layer_weights - keys_and_values) * (new - 1)
        pairs = causal_pairs(length) - causal_pairs(shared)
        not_needed += self._attention(pairs - length)
        return self.prefill(length, shared) - not_needed

    def eager_prefill(self, length: int) -> int:
        """Operations of a prompt with attention over the whole square, as in eager attention."""
        square = length**2 - causal_pairs(length)
        return self.prefill(length) + self.layers * self._attention(square)

    def decode(self, length: int, new: int) -> int:
        """Operations of the tokens after the first of `new`, after a prompt of `length`."""
        steps = max(0, new - 1)
        return 2 * steps * self.step_weights + self.layers * self._attention(
            cached_reads(length, new)
        )

    def _attention(self, pairs: int) -> int:
        return 4 * self.queries * pairs


def cached_reads(length: int, new: int) -> int:
    """Cached tokens that the steps of an answer read: all before each step's token, and its own.

    Args:
        length: Tokens of the prompt.
        new: Tokens of the answer; the first one takes no step.
    """
    steps = max(0, new - 1)
    return steps * length + causal_pairs(steps)


@dataclass(frozen=True)
class Tower:
    """A vision transformer and the projector behind it.

    Attributes:
        layers: Layers of the tower.
        run_layers: Layers that gc2ray runs: up to the features, and to the input of the last one,
            which the scores need.
        width: Width of the hidden states.
        ffn: Width of the feed-forward layers.
        patches: Patches of a view.
        pixels: Numbers of a patch: its pixels in three colours.
        text_width: Width of the language model's hidden states.
        features: Hidden states that make a patch's features.
        class_token: Whether the tower has a class token.
        merge: Patches that are merged into one visual token.
        layers_behind: Inputs and outputs of the projector's linear layers; empty: the two of LLaVA.
        projects_all: Whether all tokens go through the projector, not only those that are kept.
        score_products: Multiplications of a view's scores (`gc2ray.models.layers.scores`).
    """

    layers: int
    run_layers: int
    width: int
    ffn: int
    patches: int
    pixels: int
    text_width: int
    features: int = 1
    class_token: bool = True
    merge: int = 1
    layers_behind: tuple[tuple[int, int], ...] = ()
    projects_all: bool = False
    score_products: int = 0

    @staticmethod
    def from_config(config: Any) -> Tower:
        """From a transformers config of LLaVA-NeXT."""
        vision, named = config.vision_config, config.vision_feature_layer
        layers = vision.num_hidden_layers
        named = [named] if isinstance(named, int) else list(named)
        states = [index if index >= 0 else layers + 1 + index for index in named]
        return Tower(
            layers=layers,
            run_layers=max(*states, layers - 1),
            width=vision.hidden_size,
            ffn=vision.intermediate_size,
            patches=(vision.image_size // vision.patch_size) ** 2,
            pixels=3 * vision.patch_size**2,
            text_width=config.text_config.hidden_size,
            features=len(states),
            class_token=vision.model_type in CLASS_TOKEN_TOWERS,
        )

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a view, as the language model counts them."""
        return self.patches // self.merge

    @property
    def tokens(self) -> int:
        """Tokens of a view within the tower."""
        return self.patches + self.class_token

    @property
    def layer_weights(self) -> int:
        """Weights of the linear layers of one layer."""
        return 4 * self.width**2 + 2 * self.width * self.ffn

    @property
    def batch_weights(self) -> int:
        """Weights that a batch of views reads at least, the projector included."""
        return self.run_layers * self.layer_weights + self.pixels * self.width + self._projector

    @property
    def parameters(self) -> int:
        """All parameters of LLaVA's: embeddings, layers, outer norms, projector, newline."""
        layer = self.layer_weights + 4 * self.width + self.ffn + self.width + 4 * self.width
        around = 4 * self.width if self.class_token else 2 * self.width
        patch = self.pixels * self.width + (0 if self.class_token else self.width)
        embeddings = patch + self.tokens * self.width + self.class_token * self.width
        newline = self.text_width
        projector = self._projector + 2 * self.text_width
        return self.layers * layer + around + embeddings + projector + newline

    def whole(self, views: int) -> int:
        """Operations of all layers for some views."""
        return views * self._view(self.layers)

    def needed(self, views: int) -> int:
        """Operations of the layers that gc2ray runs, and of the scores."""
        return views * (self._view(self.run_layers) + 2 * self.score_products)

    def projector(self, tokens: int) -> int:
        """Operations of the projector's linear layers for some tokens."""
        return 2 * tokens * self._projector

    @property
    def _projector(self) -> int:
        if self.layers_behind:
            return sum(inputs * outputs for inputs, outputs in self.layers_behind)
        return self.features * self.width * self.text_width + self.text_width**2

    def _view(self, layers: int) -> int:
        linear = self.tokens * self.layer_weights
        attention = 2 * self.width * self.tokens**2
        return 2 * (layers * (linear + attention) + self.patches * self.pixels * self.width)


@dataclass(frozen=True)
class Needs:
    """Memory that a model needs, in bytes of its device.

    Attributes:
        weights: The loaded weights.
        kv_per_token: KV cache of one token.
        per_token: Activations of one token in prefill.
        per_view: Activations of one view in the vision tower.
        features_per_view: Features of a view, kept until it is compressed.
        packed_per_view: Activations of projecting an uncompressed view.
        max_positions: Longest prompt and answer, in tokens.
    """

    weights: int
    kv_per_token: int
    per_token: int
    per_view: int
    features_per_view: int
    packed_per_view: int
    max_positions: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a vision-language model: enough to count, not to run.

    Attributes:
        tower: The vision tower and the projector.
        text: The language model.
        itemsize: Bytes of a weight, an activation and a cached number.
        counted: Parameters of the whole model; 0: they follow from the sizes, as LLaVA's do.
    """

    tower: Tower
    text: TextModel
    itemsize: int
    counted: int = 0

    @staticmethod
    def from_config(config: Any, itemsize: int) -> ModelShape:
        """From a transformers config of LLaVA-NeXT, loaded with numbers of `itemsize` bytes."""
        return ModelShape(Tower.from_config(config), TextModel.from_config(config), itemsize)

    @staticmethod
    def of(tower: Tower, config: Any, itemsize: int, parameters: int) -> ModelShape:
        """A tower with the language model of a config.

        Args:
            tower: The tower.
            config: The model's config.
            itemsize: Bytes of a weight.
            parameters: Parameters of the whole model.
        """
        return ModelShape(tower, TextModel.from_config(config), itemsize, parameters)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.counted or self.tower.parameters + self.text.parameters

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache of one token over all layers."""
        return self.itemsize * self.text.cached_numbers

    def needs(self) -> Needs:
        """The memory that the model needs; activations are counted generously, by tensor."""
        tower, text, itemsize = self.tower, self.text, self.itemsize
        features = tower.patches * tower.width * tower.features
        if tower.projects_all:
            features = tower.visual_tokens * tower.text_width
        return Needs(
            weights=itemsize * self.parameters,
            kv_per_token=self.kv_bytes_per_token,
            per_token=itemsize * (12 * text.width + 3 * text.ffn),
            per_view=itemsize * tower.tokens * (8 * tower.width + 2 * tower.ffn),
            features_per_view=itemsize * features,
            packed_per_view=3 * itemsize * tower.visual_tokens * text.width,
            max_positions=text.max_positions,
        )

    def to_dict(self) -> dict[str, Any]:
        """The sizes as plain data for JSON."""
        data = asdict(self)
        data["tower"]["layers_behind"] = [list(pair) for pair in self.tower.layers_behind]
        return data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelShape:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: `data` is not what `to_dict` returns.
        """
        tower, text = Tower(**data["tower"]), TextModel(**data["text"])
        behind = tuple((int(inputs), int(outputs)) for inputs, outputs in tower.layers_behind)
        tower = replace(tower, layers_behind=behind)
        return ModelShape(tower, text, int(data["itemsize"]), int(data.get("counted", 0)))


LLAVA_7B = ModelShape(
    Tower(24, 23, width=1024, ffn=4096, patches=576, pixels=588, text_width=4096),
    TextModel(
        32, 4096, queries=4096, keys=4096, ffn=11_008, vocabulary=32_064, heads=32,
        max_positions=4096,
    ),
    itemsize=2,
)  # fmt: skip
"""LLaVA-NeXT with Vicuna-7B in half precision, as `llava-hf/llava-v1.6-vicuna-7b-hf` is."""

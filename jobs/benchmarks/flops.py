"""Floating-point operations and bytes that answers need, from the model's config.

Only products count, a multiplication and an addition as two: no norms, activations, softmax, and
not the class token's scores. Attention counts at real lengths, without padding, and causal where it
is: a query and a key that it sees are one pair.

`prefill` and `Tower.whole` are what the modules compute when they are run as they are. `needed` is
less: of the last decoder layer a prompt needs keys and values, and the rest for its last token
only; of the tower, the layers up to the features. It is what rooflines are made of, so that nobody
is praised for work that no answer needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
"""Bytes."""


def causal_pairs(length: int) -> int:
    """Queries and keys that they see, of a sequence read from its beginning."""
    return length * (length + 1) // 2


@dataclass(frozen=True)
class TextModel:
    """A language model with gated feed-forward layers.

    Attributes:
        width: Of the hidden states.
        queries: Width of all query heads together.
        keys: Width of all key heads together; values likewise.
        ffn: Width of the feed-forward layers.
        vocabulary: Logits of a token.
    """

    layers: int
    width: int
    queries: int
    keys: int
    ffn: int
    vocabulary: int

    @staticmethod
    def of(config: Any) -> TextModel:
        """From a transformers config of the Llama kind."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return TextModel(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            queries=head * config.num_attention_heads,
            keys=head * config.num_key_value_heads,
            ffn=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def layer_weights(self) -> int:
        """Of the linear layers of one decoder layer."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + 3 * self.width * self.ffn

    @property
    def head_weights(self) -> int:
        """Of the layer that makes logits."""
        return self.width * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """What a step reads at least, in float32; of the text table it reads a few rows."""
        return FLOAT32 * (self.layers * self.layer_weights + self.head_weights)

    def prefill(self, length: int) -> int:
        """Reading a prompt up to its first new token, all layers for all tokens."""
        linear = self.layers * self.layer_weights * length + self.head_weights
        return 2 * linear + self.layers * self._attention(causal_pairs(length))

    def needed_prefill(self, length: int) -> int:
        """The same without what nobody reads of the last layer."""
        keys_and_values = 2 * self.width * self.keys
        not_needed = 2 * (self.layer_weights - keys_and_values) * (length - 1)
        not_needed += self._attention(causal_pairs(length) - length)
        return self.prefill(length) - not_needed

    def paper_prefill(self, length: int, heads: int) -> int:
        """Operations of a prefill as the paper's table 8 counts them, over visual tokens alone.

        Everything at full attention, with softmax (5 each), norms, activations and additions: the
        formula of LLM-Viewer's `analyze`, which gives the table within 0.7 %. No grouped heads.
        """
        h, i, n = self.width, self.ffn, length
        layer = 2 * n * (4 * h**2 + 3 * h * i) + 4 * n**2 * h + 5 * heads * n**2 + 18 * n * h
        return self.layers * layer + 2 * h * self.vocabulary

    def decode(self, length: int, new: int) -> int:
        """Writing the tokens after the first of `new`, after a prompt of `length`."""
        linear = (new - 1) * (self.layers * self.layer_weights + self.head_weights)
        return 2 * linear + self.layers * self._attention(self._seen(length, new))

    def cache_bytes_read(self, length: int, new: int) -> int:
        """Of the KV cache, by those steps, in float32."""
        return FLOAT32 * self.layers * 2 * self.keys * self._seen(length, new)

    def _attention(self, pairs: int) -> int:
        return 4 * self.queries * pairs

    @staticmethod
    def _seen(length: int, new: int) -> int:
        return (new - 1) * length + causal_pairs(new - 1)


@dataclass(frozen=True)
class Tower:
    """A CLIP tower and the projector behind it.

    Attributes:
        needed_layers: Layers up to the features.
        ffn: Width of the feed-forward layers.
        patches: Of a view; there is one more token, the class token.
        pixels: Values of a patch.
        text_width: Of the language model.
    """

    layers: int
    needed_layers: int
    width: int
    ffn: int
    patches: int
    pixels: int
    text_width: int

    @staticmethod
    def of(config: Any) -> Tower:
        """From a transformers config of LLaVA-NeXT.

        Raises:
            ValueError: Features come from several layers.
        """
        vision, layer = config.vision_config, config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"features come from several layers: {layer}")
        layers = vision.num_hidden_layers
        return Tower(
            layers=layers,
            needed_layers=layer if layer >= 0 else layers + 1 + layer,
            width=vision.hidden_size,
            ffn=vision.intermediate_size,
            patches=(vision.image_size // vision.patch_size) ** 2,
            pixels=3 * vision.patch_size**2,
            text_width=config.text_config.hidden_size,
        )

    def whole(self, views: int) -> int:
        """All layers over some views."""
        return views * self._view(self.layers)

    def needed(self, views: int) -> int:
        """The layers up to the features."""
        return views * self._view(self.needed_layers)

    def projector(self, tokens: int) -> int:
        """Two layers over some tokens."""
        return 2 * tokens * (self.width * self.text_width + self.text_width**2)

    @property
    def weight_bytes(self) -> int:
        """What a batch reads at least, in float32."""
        layers = self.needed_layers * (4 * self.width**2 + 2 * self.width * self.ffn)
        projector = self.width * self.text_width + self.text_width**2
        return FLOAT32 * (layers + self.pixels * self.width + projector)

    def _view(self, layers: int) -> int:
        tokens = self.patches + 1
        linear = tokens * (4 * self.width**2 + 2 * self.width * self.ffn)
        attention = 2 * self.width * tokens**2
        return 2 * (layers * (linear + attention) + self.patches * self.pixels * self.width)


LLAVA_7B = (
    Tower(24, 23, width=1024, ffn=4096, patches=576, pixels=588, text_width=4096),
    TextModel(32, width=4096, queries=4096, keys=4096, ffn=11_008, vocabulary=32_064),
)
"""LLaVA-NeXT with Vicuna-7B."""

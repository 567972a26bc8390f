"""Operations of answers, in two counts, never to be mixed.

* `matmul_flops` is what the hardware does: matrix products only, a multiplication and an addition
  as two. Norms, activations and softmax are not counted, nor the class token's scores (a thousandth
  of a tower). As `GC2RAY` runs them: causal attention counts each query with the keys that it sees,
  the last decoder layer works for the last token only, and the tower stops where its features and
  scores are known. As `EAGER` transformers does: every layer whole, and attention over the square.
  The latter is what torch's `FlopCounterMode` counts with eager attention (the tests compare them).
* `paper_flops` counts as the tool behind the paper's table 8 does. For that table only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gc2ray.core.records import Demand
from gc2ray.models.shape import ModelShape, TextModel, cached_reads


class ExecutionMode(Enum):
    """Who runs a model; see the module."""

    GC2RAY = "gc2ray"
    EAGER = "eager"


@dataclass(frozen=True)
class AnswerTokens:
    """What an answer is made of, as far as its cost depends on it.

    Attributes:
        views: That went through the tower; 0 where another row's were used.
        projected: Tokens that went through the projector, newlines included; likewise.
        prompt: Tokens of text and image that the language model reads.
        output: Tokens that it writes.
        shared: Of the prompt, those whose keys and values another row had computed.
    """

    views: int
    projected: int
    prompt: int
    output: int
    shared: int = 0

    def with_more(self, image_tokens: int) -> AnswerTokens:
        """The same answer, had so many tokens more been kept of the image.

        What is shared of a prompt ends behind its image, whatever of that is kept.
        """
        return AnswerTokens(
            views=self.views,
            projected=self.projected and self.projected + image_tokens,
            prompt=self.prompt + image_tokens,
            output=self.output,
            shared=self.shared and self.shared + image_tokens,
        )


def matmul_flops(
    shape: ModelShape, tokens: AnswerTokens, run: ExecutionMode = ExecutionMode.GC2RAY
) -> dict[str, int]:
    """Operations of an answer's matrix products, by stage: `stats.STAGES` but `image`.

    `encode` is the tower, `compress` the projector, which runs after the selection, `prefill` the
    prompt up to the first new token, `generate` the others.
    """
    tower, text = shape.tower, shape.text
    ours = run is ExecutionMode.GC2RAY
    prefill = (
        text.needed_prefill(tokens.prompt, tokens.shared)
        if ours
        else text.eager_prefill(tokens.prompt)
    )
    return {
        "encode": tower.needed(tokens.views) if ours else tower.whole(tokens.views),
        "compress": tower.projector(tokens.projected),
        "prefill": prefill,
        "generate": text.decode(tokens.prompt, tokens.output),
    }


def demand_of(shape: ModelShape, tokens: AnswerTokens) -> Demand:
    """What an answer asks of a machine, run by gc2ray."""
    read = cached_reads(tokens.prompt, tokens.output)
    return Demand(matmul_flops(shape, tokens), read * shape.kv_bytes_per_token)


def paper_flops(text: TextModel, tokens: int) -> int:
    """Operations of a prefill as the paper's table 8 counts them, over visual tokens alone.

    Per layer `2n(4h² + 3hi) + 4n²h + 5an² + 18nh`: products at full attention, softmax (5 each),
    norms, activations and additions, and `2hV` once; h width, i feed-forward width, a heads, n
    tokens. Source: the formula of LLM-Viewer's `analyze` (github.com/hahnyuan/LLM-Viewer), which
    gives the table's cells within 0.7 %. No grouped heads.
    """
    h, i, n = text.width, text.ffn, tokens
    layer = 2 * n * (4 * h**2 + 3 * h * i) + 4 * n**2 * h + 5 * text.heads * n**2 + 18 * n * h
    return text.layers * layer + 2 * h * text.vocabulary

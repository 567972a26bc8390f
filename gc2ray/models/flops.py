"""Operations of answers, in two counts that must not be mixed.

* `matmul_flops` counts the matrix products that the hardware computes, a multiplication and an
  addition as two. Norms, activations and softmax are not counted. In `GC2RAY` mode causal
  attention counts each query with the keys that it sees, the last decoder layer runs for the last
  token only, and the tower stops at its features and scores. In `EAGER` mode, as in transformers,
  every layer is whole and attention covers the square; torch's `FlopCounterMode` counts the same
  with eager attention (the tests compare them).
* `paper_flops` counts like the tool behind the paper's table 8, for that table only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gc2ray.core.records import Demand
from gc2ray.models.shape import ModelShape, TextModel, cached_reads


class ExecutionMode(Enum):
    """How a model is run; see the module."""

    GC2RAY = "gc2ray"
    EAGER = "eager"


@dataclass(frozen=True)
class AnswerTokens:
    """The counts that an answer's cost depends on.

    Attributes:
        views: Views that went through the tower; 0 if another row's were used.
        projected: Tokens that went through the projector, newlines included; 0 if another row's
            were used.
        prompt: Tokens of text and image that the language model reads.
        output: Tokens that the language model writes.
        shared: Prompt tokens whose keys and values another row had computed.
    """

    views: int
    projected: int
    prompt: int
    output: int
    shared: int = 0


def matmul_flops(
    shape: ModelShape, tokens: AnswerTokens, run: ExecutionMode = ExecutionMode.GC2RAY
) -> dict[str, int]:
    """Operations of an answer's matrix products, by stage (all of `stats.STAGES` but `image`).

    `encode` is the tower, `compress` the projector, which runs after the selection, `prefill` the
    prompt up to the first new token, `generate` the others.
    """
    tower, text = shape.tower, shape.text
    ours = run is ExecutionMode.GC2RAY
    projected = tokens.projected
    if tower.projects_all:
        projected = tokens.views * tower.visual_tokens
    prefill = (
        text.needed_prefill(tokens.prompt, tokens.shared)
        if ours
        else text.eager_prefill(tokens.prompt)
    )
    return {
        "encode": tower.needed(tokens.views) if ours else tower.whole(tokens.views),
        "compress": tower.projector(projected),
        "prefill": prefill,
        "generate": text.decode(tokens.prompt, tokens.output),
    }


def demand_of(shape: ModelShape, tokens: AnswerTokens) -> Demand:
    """The operations and cache reads of an answer, run by gc2ray."""
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

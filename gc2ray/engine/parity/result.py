"""`Parity`: the result of a parity check."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-1, "float16": 2e-2}
"""Largest logit difference allowed, as a share of the position's largest logit."""


@dataclass(frozen=True)
class StockCheck:
    """How closely gc2ray follows stock transformers.

    Attributes:
        prompts: Prompts compared.
        same_prompts: Prompts with the same token ids in both.
        expanded_by_stock: Whether the placeholders of stock's prompts were expanded by its own
            processor.
        our_ends: Token ids that end our answers.
        stock_ends: Token ids that end stock's answers.
        difference: Largest difference of logits, as a share of the position's largest logit;
            infinite where any logit is not finite.
        where: The position of that difference, as messages name it.
        tokens: Tokens of stock's answers.
        same_tokens: Tokens of stock's answers before the first that differs in ours.
        same_answers: Answers with the same tokens, the same end and the same text.
        near_ties: Answers that differ first at two tokens whose logits in stock nearly tie.
    """

    prompts: int = 0
    same_prompts: int = 0
    expanded_by_stock: bool = True
    our_ends: tuple[int, ...] = ()
    stock_ends: tuple[int, ...] = ()
    difference: float = 0.0
    where: str = ""
    tokens: int = 0
    same_tokens: int = 0
    same_answers: int = 0
    near_ties: int = 0

    def passed(self, dtype: str) -> bool:
        """Whether both agree, within the precision of the dtype."""
        whole = self.same_answers + (0 if dtype == "float32" else self.near_ties)
        same_ends = set(self.our_ends) == set(self.stock_ends)
        close = self.difference <= TOLERANCE[dtype]
        return 0 < self.prompts == self.same_prompts == whole and same_ends and close


@dataclass(frozen=True)
class Parity:
    """The result of a parity check.

    Attributes:
        dtype: The model's dtype in the recipe.
        stock: The comparison with stock transformers.
        stock_error: Why stock transformers could not run the model; None where it could.
        prompts: Prompts answered as configured: all rows but those left out.
        same_alone: Prompts answered the same in a batch and alone.
        near_ties: Prompts answered differently, first at two tokens whose logits nearly tie; None
            where ties are not looked for.
        left_out: Prompts that cannot be answered or compared, as `row_key: message`.
        failed: Prompts that were not answered although they should have been, or that were answered
            differently in a batch than alone, as `row_key: message`.
        host_bytes: Peak memory of the process.
        device_bytes: Peak memory of the process on the GPU; 0 without one.
    """

    dtype: str
    stock: StockCheck
    stock_error: str | None
    prompts: int
    same_alone: int
    near_ties: int | None
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    host_bytes: int
    device_bytes: int

    @property
    def passed(self) -> bool:
        """Whether everything agrees, within the precision of the dtype."""
        return self.prompts > 0 and not self.failed and self.stock.passed(self.dtype)

"""`Parity`: the result of a parity check, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gc2ray.core.format import size

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-1, "float16": 2e-2}
"""Largest logit difference allowed, as a share of the position's largest logit."""


@dataclass(frozen=True)
class StockCheck:
    """How closely gc2ray follows stock transformers.

    Attributes:
        prompts: Prompts compared.
        same_prompts: Prompts with the same token ids in both.
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

    def lines(self) -> list[str]:
        """The result in lines of text."""
        batches = f"batch against one by one, as configured: {self.same_alone} of {self.prompts} "
        batches += "answers the same" + self._exceptions()
        device = f", {size(self.device_bytes)} of the GPU" if self.device_bytes else ""
        return [
            *(f"left out: {line}" for line in self.left_out),
            *(f"failed: {line}" for line in self.failed),
            *self._against_stock(),
            batches,
            f"peak memory: {size(self.host_bytes)} of the host{device}",
        ]

    def _exceptions(self) -> str:
        """Differences between batches and single rows that are allowed."""
        if self.dtype == "float32":
            return ""
        if self.near_ties is None:
            return " (sampled in half precision, so only counted)"
        return f", {self.near_ties} more but for a near tie (allowed)"

    def _against_stock(self) -> list[str]:
        if self.stock_error is not None:
            return [f"stock transformers cannot run the model: {self.stock_error}"]
        stock, prompts = self.stock, self.stock.prompts
        if not prompts:
            return ["no prompt could be compared with stock transformers"]
        others = "; the others are not compared any further"
        rest = others if stock.same_prompts < prompts else ""
        ends = f"ends of answers: {_listed(stock.our_ends)}; stock's: {_listed(stock.stock_ends)}"
        ties = ""
        if self.dtype != "float32":
            ties = f", {stock.near_ties} more but for a near tie (allowed)"
        return [
            f"{prompts} prompts at retention 1.0 against stock transformers:",
            f"  prompt tokens: {stock.same_prompts} of {prompts} prompts the same{rest}",
            f"  {ends}",
            f"  largest logit difference: {stock.difference:.2e} of the largest logit (allowed "
            f"{TOLERANCE[self.dtype]:.0e}){stock.where}",
            f"  greedy answers: {stock.same_tokens} of {stock.tokens} tokens the same, "
            f"{stock.same_answers} of {prompts} answers and their ends and texts{ties}",
        ]


def _listed(ends: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ends))) or "none"

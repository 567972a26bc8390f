"""Parity with stock transformers on the user's own model and rows: the first thing a user asks.

`check` compares, prompt by prompt, our logits of the first answer token at retention 1.0 with
stock's on the same image and prompt, and the recipe's own answers in a batch with the same prompts
one by one.

In float32 both must agree; in half precision different batch shapes round differently, so there
logits are held to a loose bound and answers are only counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gc2ray.config import CompressionConfig, Job, Recipe
from gc2ray.engine import Engine, load_model
from gc2ray.errors import BadRow
from gc2ray.families.family import Loaded
from gc2ray.families.stock import prompt_logits, stock_logits
from gc2ray.images import decode, read_bytes
from gc2ray.prompts import ChatPrompt
from gc2ray.records import Request
from gc2ray.shards import first_spans
from gc2ray.sources.source import Source

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest logit difference allowed, as a share of the largest logit."""


@dataclass(frozen=True)
class Parity:
    """What a check found.

    Attributes:
        prompts: Prompts compared: all of the rows that were asked for, but for those left out.
        left_out: Prompts that cannot be answered, as `row_key: message`.
        logit_difference: Largest difference to stock, as a share of the largest logit.
        tolerance: What is allowed for the recipe's dtype.
        same_first_token: Prompts whose most likely first token is stock's.
        same_alone: Prompts answered the same in a batch and alone.
        exact: Whether answers must agree too (float32).
    """

    prompts: int
    left_out: tuple[str, ...]
    logit_difference: float
    tolerance: float
    same_first_token: int
    same_alone: int
    exact: bool

    @property
    def passed(self) -> bool:
        """Whether our path is stock's path, as far as the dtype lets one tell."""
        close = self.prompts > 0 and self.logit_difference <= self.tolerance
        if not self.exact:
            return close
        return close and self.same_first_token == self.same_alone == self.prompts


def check(job: Job, rows: int) -> Parity:
    """Compare on every prompt of the first `rows` rows of the input.

    Raises:
        ConfigError: Model or input cannot be used.
    """
    source = Source(job.recipe.input)
    files, _ = source.scan()
    loaded = load_model(job.recipe, job.cluster)
    uncompressed = Engine(loaded, _uncompressed(job.recipe), job.cluster)
    recipe = Engine(loaded, job.recipe, job.cluster)
    worst, same_first = 0.0, 0
    good: list[Request] = []
    bad: list[str] = []
    spans = first_spans(files, rows)
    memory = job.cluster.host_memory_bytes
    for request in (request for span in spans for request in source.read(span, memory)):
        try:
            difference, same = _against_stock(loaded, uncompressed, job.recipe, request)
        except BadRow as error:
            bad.append(f"{request.row_key}: {error.message}")
            continue
        worst, same_first = max(worst, difference), same_first + same
        good.append(request)
    together = _tokens(recipe, good)
    alone: dict[str, tuple[int, ...]] = {}
    for request in good:
        recipe.forget()  # or its image would be the one that was encoded in the batch
        alone |= _tokens(recipe, [request])
    return Parity(
        prompts=len(good),
        left_out=tuple(bad),
        logit_difference=worst,
        tolerance=TOLERANCE[job.recipe.model.dtype],
        same_first_token=same_first,
        same_alone=sum(together[key] == alone[key] for key in together),
        exact=job.recipe.model.dtype == "float32",
    )


def _tokens(engine: Engine, requests: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    return {answer.request.row_key: answer.token_ids for answer in engine.stream(requests)}


def _uncompressed(recipe: Recipe) -> Recipe:
    """Everything, packed as stock packs it."""
    compression = CompressionConfig(method="none")
    return recipe.model_copy(update={"compression": compression})


def _against_stock(
    loaded: Loaded, engine: Engine, recipe: Recipe, request: Request
) -> tuple[float, bool]:
    """Relative logit difference to stock, and whether the most likely token is the same."""
    prompt = engine.prompts([request])[0]
    policy = recipe.input.image_policy()
    image = decode(read_bytes(request.images[0], policy), policy)
    text = ChatPrompt(loaded.processor).render(request.prompts[0])
    ours, stock = prompt_logits(loaded, prompt).float(), stock_logits(loaded, image, text).float()
    difference = (ours - stock).abs().max() / stock.abs().max().clamp_min(1e-12)
    return float(difference), bool(ours.argmax() == stock.argmax())

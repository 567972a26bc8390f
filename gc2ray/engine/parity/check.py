"""Parity with stock transformers on the user's own model and rows: `gc2ray check`.

`check_parity` compares two implementations that share nothing but the checkpoint's files:

1. Stock transformers loads the checkpoint and answers a few prompts, made with the tokenizer's own
   chat template. Its logits at every position behind the image, its greedy answer and the end of
   that answer are kept on the host; then the model is freed.
2. gc2ray loads the model as a worker does and answers the same prompts at retention 1.0. Compared
   are the prompt's tokens, the tokens that end answers, the decoder's logits along stock's tokens
   (once prefilled up to the image and once up to the answer, the rest token by token), and the
   engine's answers.
3. gc2ray answers all rows as configured, in a batch and one by one.

In float32 everything must agree. In half precision the order of operations decides near ties:
there logits are held to a loose bound, and where an answer first differs, the logits of the two
tokens may lie at most `STEPS` steps of the dtype apart (stock's logits when an answer differs from
stock's; ours for the prompt alone when it differs from the batch's). A logit that is not finite
agrees with nothing.

Not covered: sampled answers against stock, which draws other random numbers; sampled answers in
half precision in a batch against one by one, which are only counted; rows whose text spells out
special tokens, which stock takes for the tokens themselves.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from gc2ray.core.arguments import check_count
from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import AuditConfig, Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.records import Answer, Request
from gc2ray.core.shards import first_spans
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode
from gc2ray.engine.decoding.forced import ForcedDecoder, largest_difference
from gc2ray.engine.device import own_device, peak_host_bytes
from gc2ray.engine.engine import Engine, load_recipe_model
from gc2ray.engine.parity.result import Parity, StockCheck
from gc2ray.engine.sample import refusing_unreadable_input, sample_requests
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel
from gc2ray.models.base import Prompt
from gc2ray.models.checkpoint.fetch import fetch_model
from gc2ray.models.hf_reference import (
    StockAnswer,
    StockFailed,
    StockModel,
    StockSettings,
    expanded_ids,
)
from gc2ray.models.image_processor import Cropping

STEPS = 2
"""Most steps of a half precision dtype between two logits where answers first differ."""
PRECISION = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance of two neighbouring numbers between 1 and 2."""
NEW_TOKENS = 32
"""Longest answer that is compared with stock's."""
STOCK_PROMPTS, STOCK_BYTES = 8, 1 << 30
"""Prompts that stock answers; fewer where their logits take more memory than this."""
STOCK_CANVAS = 1 << 27
"""Most pixels that stock may pad an image to: 400 MB for each of its copies."""


def check_parity(job: Job, rows: int) -> Parity:
    """Compare answers to the prompts of the first `rows` rows; stock answers the first of these.

    Raises:
        ConfigError: `rows` is out of range, or model or input cannot be used.
    """
    check_count("rows", rows, 1)
    recipe, requests = job.recipe, _first_requests(job, rows)
    directory, taken_over = fetch_model(recipe.model).directory, recipe.taken_over()
    # Before stock, which accepts checkpoints that gc2ray refuses.
    metadata = loading.load_metadata(
        str(directory), dtype=recipe.model.dtype, taken_over=taken_over
    )
    stock = _run_stock(recipe, directory, requests, metadata.family.cropping)
    loaded = load_recipe_model(job.recipe, job.cluster)
    ours = _Comparison(job, loaded, stock)
    ours.compare_with_stock(requests)
    pairs = ours.batched_and_alone(requests)
    near_ties = ours.compare_batches(pairs)
    return Parity(
        dtype=recipe.model.dtype,
        stock=ours.stock_check,
        stock_error=stock.error,
        prompts=len(pairs),
        same_alone=sum(pair.same for pair in pairs),
        near_ties=near_ties,
        left_out=tuple(ours.left_out.values()),
        failed=tuple(ours.failed.values()),
        host_bytes=peak_host_bytes(),
        device_bytes=ours.device_bytes,
    )


def _first_requests(job: Job, rows: int) -> list[Request]:
    requests, _ = sample_requests(job.recipe.input, rows, first_spans)
    return requests


@dataclass(frozen=True)
class _StockAnswers:
    """Stock's answers.

    Attributes:
        answers: Answers by row key.
        sizes: (height, width) of the rows' images, by row key.
        end_tokens: Token ids that end an answer.
        left_out: Rows that stock reads differently on purpose, and why.
        expands: Whether stock itself expands the placeholders.
        error: Why stock cannot run the model.
    """

    answers: dict[str, StockAnswer] = field(default_factory=dict)
    sizes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    end_tokens: tuple[int, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    expands: bool = True
    error: str | None = None


def _run_stock(
    recipe: Recipe, directory: Path, requests: Sequence[Request], cropping: Cropping
) -> _StockAnswers:
    """Load the checkpoint in stock transformers, answer the first prompts, and free it."""
    answers: dict[str, StockAnswer] = {}
    sizes: dict[str, list[tuple[int, int]]] = {}
    left_out: dict[str, str] = {}
    policy, logit_bytes = recipe.input.image_limits(), 0
    try:
        with StockModel(directory, _settings(recipe)) as model:
            for request in requests:
                if len(answers) >= STOCK_PROMPTS or logit_bytes >= STOCK_BYTES:
                    break
                if request.fault is not None:
                    continue
                text, key = request.prompts[0], request.row_key
                special = model.special_token_in(text)
                if special is not None:
                    left_out[key] = f"{key}: its text spells out {special}"
                    continue
                try:
                    with refusing_unreadable_input():
                        images = [decode(read_bytes(ref, policy), policy) for ref in request.images]
                except BadRow:
                    continue  # our engine reports it, too
                shown, alone = [(image.height, image.width) for image in images], len(images) == 1
                cuts = [cropping.cut(size, alone=alone) for size in shown]
                if (pixels := max((cut.padded_pixels for cut in cuts), default=0)) > STOCK_CANVAS:
                    left_out[key] = (
                        f"{key}: stock transformers would pad an image to {pixels} pixels"
                    )
                    continue
                answers[key] = model.answer(images, text)
                sizes[key] = shown
                logit_bytes += answers[key].logits.nbytes
            return _StockAnswers(answers, sizes, model.end_tokens, left_out, expands=model.expands)
    except StockFailed as error:
        return _StockAnswers(error=str(error))


class _Comparison:
    """Runs gc2ray's engine and compares it with stock and with itself.

    Attributes:
        stock_check: The comparison with stock.
        left_out: Rows that cannot be answered or compared, and why.
        failed: Rows that should have been answered, and why they were not.
        device_bytes: Peak memory on the GPU.
    """

    def __init__(self, job: Job, loaded: LoadedModel, stock: _StockAnswers) -> None:
        self._job, self._loaded, self._stock = job, loaded, stock
        self.stock_check = StockCheck()
        self.left_out: dict[str, str] = dict(stock.left_out)
        self.failed: dict[str, str] = {}
        self.device_bytes = 0

    def compare_with_stock(self, requests: Sequence[Request]) -> None:
        """At retention 1.0: prompts, ends, logits, answers."""
        compared = [request for request in requests if request.row_key in self._stock.answers]
        engine = Engine(self._loaded, _uncompressed(self._job.recipe), self._job.cluster)
        prompts: dict[str, Prompt] = {}
        for request in compared:
            try:
                prompts[request.row_key] = engine.prompts([request])[0]
            except BadRow as error:
                self._note(request, error.status, error.message)
        same = {key: prompt for key, prompt in prompts.items() if self._is_same_prompt(key, prompt)}
        difference, where = self._differences(same)
        answers = {
            answer.request.row_key: answer
            for answer in engine.stream([r for r in compared if r.row_key in same])
        }
        self._end(engine)
        for answer in answers.values():
            self._note(answer.request, answer.status, answer.error)
        self.stock_check = StockCheck(
            prompts=len(prompts),
            same_prompts=len(same),
            expanded_by_stock=self._stock.expands,
            our_ends=self._loaded.end_tokens,
            stock_ends=self._stock.end_tokens,
            difference=difference,
            where=where,
            **self._same_answers(answers),
        )

    def _is_same_prompt(self, key: str, prompt: Prompt) -> bool:
        family = self._loaded.adapter.family
        filler = int(self._loaded.model.config.image_token_id)
        ours = expanded_ids(family, prompt.token_ids, self._stock.sizes[key], filler)
        return tuple(ours) == self._stock.answers[key].expanded_ids

    def _differences(self, prompts: Mapping[str, Prompt]) -> tuple[float, str]:
        """The largest difference of logits, and its position for messages."""
        worst, where = 0.0, ""
        forced = ForcedDecoder(self._loaded.model)
        for key, prompt in prompts.items():
            stock = self._stock.answers[key]
            start = prompt.visual[-1][1] if prompt.visual else 1
            behind = len(prompt) - start
            tail = stock.expanded_ids[len(stock.expanded_ids) - behind :]
            written = stock.token_ids[:-1]
            # Stock's begin at the last visual token, behind which literals of its image may stand.
            wanted = stock.logits[len(stock.logits) - behind - len(stock.token_ids) :]
            stepped = forced.logits(prompt.until(start), [*tail, *written])
            whole = forced.logits(prompt, written)
            for logits, skipped in ((stepped, 0), (whole, behind)):
                difference, at = largest_difference(logits, wanted[skipped:])
                if difference >= worst:
                    worst = difference
                    origin = "image" if prompt.visual else "first token"
                    where = f", {skipped + at} tokens behind the {origin} of {key}"
        return worst, where

    def _same_answers(self, answers: Mapping[str, Answer]) -> dict[str, int]:
        """Counts of tokens and answers equal to stock's, as `StockCheck` names them."""
        counts = dict.fromkeys(("tokens", "same_tokens", "same_answers", "near_ties"), 0)
        for key, answer in answers.items():
            stock, ours = self._stock.answers[key], answer.token_ids
            first = _first_difference(ours, stock.token_ids)
            same = first is None and answer.finish_reason == stock.finish_reason
            same = same and answer.answer == stock.text
            counts["tokens"] += len(stock.token_ids)
            counts["same_tokens"] += len(stock.token_ids) if first is None else first
            counts["same_answers"] += same
            counts["near_ties"] += first is not None and self._nearly_tie(stock, ours, first)
        return counts

    def _nearly_tie(self, stock: StockAnswer, ours: Sequence[int], first: int) -> bool:
        """Whether stock's logits of the two tokens at the first difference nearly tie."""
        if first >= min(len(ours), len(stock.token_ids)):
            return False
        logits = stock.logits[len(stock.logits) - len(stock.token_ids) + first].tolist()
        had = {*stock.expanded_ids, *stock.token_ids[:first]}
        return self._tie(logits, had, (stock.token_ids[first], ours[first]))

    def _tie(self, logits: Sequence[float], had: Set[int], tokens: tuple[int, int]) -> bool:
        """Whether the logits of two tokens nearly tie, once tokens `had` before are penalised."""
        dtype = self._job.recipe.model.dtype
        if dtype not in PRECISION:
            return False
        penalty = self._job.recipe.generation.repetition_penalty or 1.0
        a, b = (_penalised(logits[token], penalty if token in had else 1.0) for token in tokens)
        step = PRECISION[dtype] * 2.0 ** (math.frexp(max(abs(a), abs(b)))[1] - 1)
        return abs(a - b) <= STEPS * step

    def batched_and_alone(self, requests: Sequence[Request]) -> list[_Pair]:
        """Answer as configured, in a batch and one by one; rows that fail are left out."""
        engine = self._engine_as_configured()
        together = {answer.request.row_key: answer for answer in engine.stream(requests)}
        for answer in together.values():
            self._note(answer.request, answer.status, answer.error)
        pairs = []
        for request in requests:
            if together[request.row_key].error is not None:
                continue
            engine.clear_cache()  # else the image encoded in the batch would be used again
            (alone,) = engine.stream([request])
            self._note(request, alone.status, alone.error)
            pairs.append(_Pair(request, together[request.row_key].token_ids, alone.token_ids))
        self._end(engine)
        return pairs

    def compare_batches(self, pairs: Sequence[_Pair]) -> int | None:
        """How many answers differ by a near tie only; any other difference is a failure.

        None where differences are only counted: with sampling in half precision a small difference
        of logits may change any token.
        """
        exact = self._job.recipe.model.dtype not in PRECISION
        if not exact and self._job.recipe.generation.temperature > 0:
            return None
        differing = [pair for pair in pairs if not pair.same]
        reader = None if exact or not differing else self._engine_as_configured()
        ties = 0
        for pair in differing:
            if reader is not None and self._ties_alone(reader, pair):
                ties += 1
            else:
                message = f"answered differently in a batch than alone, from token {pair.first} on"
                self._note(pair.request, Status.FAILED, message)
        return ties

    def _engine_as_configured(self) -> Engine:
        gc.collect()  # frees the KV cache of the previous engine
        return Engine(self._loaded, self._job.recipe, self._job.cluster)

    def _ties_alone(self, engine: Engine, pair: _Pair) -> bool:
        """Whether the two tokens at the first difference nearly tie for the row alone."""
        first = pair.first
        if first is None or first >= min(len(pair.batched), len(pair.alone)):
            return False
        prompt, common = engine.prompts([pair.request])[0], pair.alone[:first]
        logits = ForcedDecoder(self._loaded.model).logits(prompt, common)[-1].tolist()
        had = {*prompt.penalised_ids, *common}
        return self._tie(logits, had, (pair.batched[first], pair.alone[first]))

    def _note(self, request: Request, status: Status, message: str | None) -> None:
        """Note a row that failed, or one that cannot be answered and is left out."""
        noted = self.failed if status is Status.FAILED else self.left_out
        if message is not None:
            noted.setdefault(request.row_key, f"{request.row_key}: {message}")

    def _end(self, engine: Engine) -> None:
        self.device_bytes = max(self.device_bytes, engine.totals().peak_device_bytes)


@dataclass(frozen=True)
class _Pair:
    """A prompt's tokens in a batch and alone."""

    request: Request
    batched: tuple[int, ...]
    alone: tuple[int, ...]

    @property
    def first(self) -> int | None:
        """Index of the first token that differs; None where none does."""
        return _first_difference(self.batched, self.alone)

    @property
    def same(self) -> bool:
        """Whether all tokens agree."""
        return self.first is None


def _uncompressed(recipe: Recipe) -> Recipe:
    """The recipe without compression, packed and decoded as stock does."""
    generation = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        stop_token_ids=recipe.generation.stop_token_ids,
        repetition_penalty=recipe.generation.repetition_penalty,
    )
    changes = {
        "compression": CompressionConfig(method="none"),
        "generation": generation,
        "audit": AuditConfig(),
    }
    return recipe.model_copy(update=changes)


def _settings(recipe: Recipe) -> StockSettings:
    generation = recipe.generation
    return StockSettings(
        dtype=recipe.model.dtype,
        device=own_device(),
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=generation.repetition_penalty,
        stop_token_ids=generation.stop_token_ids,
        ignored=generation.ignore_model_rules,
    )


def _first_difference(ours: Sequence[int], stock: Sequence[int]) -> int | None:
    """Index of the first token that differs or is missing in one of them; None where none is."""
    for index, (a, b) in enumerate(zip(ours, stock, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(stock) else min(len(ours), len(stock))


def _penalised(logit: float, penalty: float) -> float:
    return logit * penalty if logit < 0 else logit / penalty

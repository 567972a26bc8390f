"""Parity with stock transformers on the user's own model and rows: the first thing a user asks.

`check` compares two things that share nothing but the files. Stock comes first: transformers loads
the checkpoint itself and makes the prompt with the tokenizer's own chat template; of a few prompts
its logits at every position behind the image, its greedy answer, and where that ends stay on the
host. Then it is freed, and our model is loaded as a worker loads it, and asked the same at
retention 1.0: the prompt's tokens, the tokens that end answers, the logits of our decoder along
stock's tokens (once prefilled up to the image and once up to the answer, the rest token by token),
and the engine's own answers. At last the recipe as it is: answers in a batch and one by one.

In float32 everything must agree. In half precision the order of operations decides near ties:
there logits are held to a loose bound, and where an answer first differs, the logits of the two
tokens may lie at most `STEPS` steps of the dtype apart: stock's own where it is stock's answer that
differs, ours of the prompt alone where it is the batch's. What is not finite agrees with nothing.

Not covered: sampled answers against stock, whose random numbers are others, and in half precision
in a batch against one by one, which are only counted; rows whose text spells out special tokens,
which stock takes for the tokens themselves.
"""

from __future__ import annotations

import gc
import math
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from gc2ray.core.config.compression import CompressionConfig
from gc2ray.core.config.generation import GenerationConfig
from gc2ray.core.config.job import Job
from gc2ray.core.config.recipe import AuditConfig, Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.format import size
from gc2ray.core.records import Answer, Request
from gc2ray.core.shards import first_spans
from gc2ray.data.dataset import Source
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import decode
from gc2ray.engine.decoding.forced import ForcedDecoder, largest_difference
from gc2ray.engine.device import own_device
from gc2ray.engine.engine import Engine, load_model
from gc2ray.models import loading
from gc2ray.models.base import LoadedModel, Prompt
from gc2ray.models.checkpoint.fetch import fetch_model
from gc2ray.models.hf_reference import StockAnswer, StockFailed, StockModel, StockSettings

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-1, "float16": 2e-2}
"""Largest logit difference allowed, as a share of the position's largest logit."""
STEPS = 2
"""Of half precision, that two logits may lie apart where an answer first differs."""
PRECISION = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""A step of the dtype between 1 and 2."""
NEW_TOKENS = 32
"""Longest answer that is compared with stock's."""
STOCK_PROMPTS, STOCK_BYTES = 8, 1 << 30
"""Prompts that stock is asked; fewer where their logits take more memory than this."""


@dataclass(frozen=True)
class StockCheck:
    """How far our path is stock's.

    Attributes:
        prompts: Prompts compared.
        same_prompts: Of them, those that have the token ids that stock made of them.
        our_ends: Token ids that end our answers.
        stock_ends: Those that end stock's.
        difference: Largest difference of logits, as a share of the position's largest one;
            infinite where any is not finite.
        where: At which position that is.
        tokens: Tokens of stock's answers.
        same_tokens: Of them, those that ours have, up to the first that differs.
        same_answers: Answers with the same tokens, the same end and the same text.
        near_ties: Answers that differ from where stock's logits of the two tokens all but tie.
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
        """Whether it is, as far as the dtype lets one tell."""
        whole = self.same_answers + (0 if dtype == "float32" else self.near_ties)
        same_ends = set(self.our_ends) == set(self.stock_ends)
        close = self.difference <= TOLERANCE[dtype]
        return 0 < self.prompts == self.same_prompts == whole and same_ends and close


@dataclass(frozen=True)
class Parity:
    """What a check found.

    Attributes:
        dtype: Of the recipe's model.
        stock: How far our path is stock's.
        stock_trouble: Why stock could not be asked; None where it could.
        prompts: Prompts answered as the recipe says: all of the rows, but for those left out.
        same_alone: Of them, those answered the same in a batch and alone.
        near_ties: Of the others, those that differ from where our logits of the two tokens all but
            tie; None where this is not asked.
        left_out: Prompts that cannot be answered or compared, as `row_key: message`.
        failed: Prompts that should have been answered and were not, or not as they are alone, as
            `row_key: message`.
        host_bytes: Most memory that the process had.
        device_bytes: Most memory that it had of a GPU; 0 without one.
    """

    dtype: str
    stock: StockCheck
    stock_trouble: str | None
    prompts: int
    same_alone: int
    near_ties: int | None
    left_out: tuple[str, ...]
    failed: tuple[str, ...]
    host_bytes: int
    device_bytes: int

    @property
    def passed(self) -> bool:
        """Whether everything agrees, as far as the dtype lets one tell."""
        return self.prompts > 0 and not self.failed and self.stock.passed(self.dtype)

    def lines(self) -> list[str]:
        """What a person is told."""
        batches = f"batch against one by one, as configured: {self.same_alone} of {self.prompts} "
        batches += "answers the same" + self._but_for()
        device = f", {size(self.device_bytes)} of the GPU" if self.device_bytes else ""
        return [
            *(f"left out: {line}" for line in self.left_out),
            *(f"failed: {line}" for line in self.failed),
            *self._against_stock(),
            batches,
            f"peak memory: {size(self.host_bytes)} of the host{device}",
        ]

    def _but_for(self) -> str:
        """What else is allowed of batches."""
        if self.dtype == "float32":
            return ""
        if self.near_ties is None:
            return " (sampled in half precision, so only counted)"
        return f", {self.near_ties} more but for a near tie (allowed)"

    def _against_stock(self) -> list[str]:
        if self.stock_trouble is not None:
            return [f"stock transformers cannot run the model: {self.stock_trouble}"]
        found, prompts = self.stock, self.stock.prompts
        if not prompts:
            return ["no prompt could be compared with stock transformers"]
        others = "; the others are not compared any further"
        rest = others if found.same_prompts < prompts else ""
        ends = f"ends of answers: {_shown(found.our_ends)}; stock's: {_shown(found.stock_ends)}"
        ties = ""
        if self.dtype != "float32":
            ties = f", {found.near_ties} more but for a near tie (allowed)"
        return [
            f"{prompts} prompts at retention 1.0 against stock transformers:",
            f"  prompt tokens: {found.same_prompts} of {prompts} prompts the same{rest}",
            f"  {ends}",
            f"  largest logit difference: {found.difference:.2e} of the largest logit (allowed "
            f"{TOLERANCE[self.dtype]:.0e}){found.where}",
            f"  greedy answers: {found.same_tokens} of {found.tokens} tokens the same, "
            f"{found.same_answers} of {prompts} answers and their ends and texts{ties}",
        ]


def check(job: Job, rows: int) -> Parity:
    """Compare on the prompts of the first `rows` rows of the input; stock on the first of these.

    Raises:
        ConfigError: Model or input cannot be used.
    """
    recipe, requests = job.recipe, list(_requests(job, rows))
    directory, taken_over = fetch_model(recipe.model).directory, recipe.generation.taken_over()
    # First, because stock takes what answers would not follow.
    loading.load_metadata(str(directory), dtype=recipe.model.dtype, taken_over=taken_over)
    stock = _Stock.asked(recipe, directory, requests)
    loaded = load_model(job.recipe, job.cluster)
    ours = _Ours(job, loaded, stock)
    ours.compare_with_stock(requests)
    pairs = ours.batched_and_alone(requests)
    near_ties = ours.compare_batches(pairs)
    return Parity(
        dtype=recipe.model.dtype,
        stock=ours.found,
        stock_trouble=stock.trouble,
        prompts=len(pairs),
        same_alone=sum(pair.same for pair in pairs),
        near_ties=near_ties,
        left_out=tuple(ours.left_out.values()),
        failed=tuple(ours.failed.values()),
        host_bytes=_host_peak(),
        device_bytes=ours.device_bytes,
    )


def _requests(job: Job, rows: int) -> Iterator[Request]:
    source = Source(job.recipe.input)
    files, _ = source.scan()
    for span in first_spans(files, rows):
        yield from source.read(span, job.cluster.host_memory_bytes)


@dataclass(frozen=True)
class _Stock:
    """What stock said.

    Attributes:
        answers: By row key.
        end_tokens: Its ends of answers.
        left_out: Rows that it would read otherwise on purpose, and why.
        trouble: Why it could not be asked.
    """

    answers: dict[str, StockAnswer] = field(default_factory=dict)
    end_tokens: tuple[int, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    trouble: str | None = None

    @staticmethod
    def asked(recipe: Recipe, directory: Path, requests: Sequence[Request]) -> _Stock:
        """Load it, ask it about the first prompts, and free it."""
        asked, policy = _Stock(), recipe.input.image_policy()
        held = 0
        try:
            with StockModel(directory, _settings(recipe)) as model:
                for request in requests:
                    if len(asked.answers) >= STOCK_PROMPTS or held >= STOCK_BYTES:
                        break
                    if request.fault is not None:
                        continue
                    text, key = request.prompts[0], request.row_key
                    special = model.special_token_in(text)
                    if special is not None:
                        asked.left_out[key] = f"{key}: its text spells out {special}"
                        continue
                    try:
                        image = decode(read_bytes(request.images[0], policy), policy)
                    except BadRow:
                        continue  # ours says so, too
                    asked.answers[key] = model.answer(image, text)
                    held += asked.answers[key].logits.nbytes
                return _Stock(asked.answers, model.end_tokens, asked.left_out)
        except StockFailed as error:
            return _Stock(trouble=str(error))


class _Ours:
    """Our path, held against stock's and against itself.

    Attributes:
        found: How far it is stock's.
        left_out: Rows that cannot be answered or compared, and why.
        failed: Rows that should have been answered, and why they were not.
        device_bytes: Most memory of a GPU.
    """

    def __init__(self, job: Job, loaded: LoadedModel, stock: _Stock) -> None:
        self._job, self._loaded, self._stock = job, loaded, stock
        self.found = StockCheck()
        self.left_out: dict[str, str] = dict(stock.left_out)
        self.failed: dict[str, str] = {}
        self.device_bytes = 0

    def compare_with_stock(self, requests: Sequence[Request]) -> None:
        """At retention 1.0: prompts, ends, logits, answers."""
        asked = [request for request in requests if request.row_key in self._stock.answers]
        engine = Engine(self._loaded, _uncompressed(self._job.recipe), self._job.cluster)
        prompts: dict[str, Prompt] = {}
        for request in asked:
            try:
                prompts[request.row_key] = engine.prompts([request])[0]
            except BadRow as error:
                self._note(request, error.status, error.message)
        same = {key: prompt for key, prompt in prompts.items() if self._is_stocks(key, prompt)}
        difference, where = self._differences(same)
        answers = {
            answer.request.row_key: answer
            for answer in engine.stream([request for request in asked if request.row_key in same])
        }
        self._end(engine)
        for answer in answers.values():
            self._note(answer.request, answer.status, answer.error)
        self.found = StockCheck(
            prompts=len(prompts),
            same_prompts=len(same),
            our_ends=self._loaded.end_tokens,
            stock_ends=self._stock.end_tokens,
            difference=difference,
            where=where,
            **self._same_answers(answers),
        )

    def _is_stocks(self, key: str, prompt: Prompt) -> bool:
        return prompt.token_ids == self._stock.answers[key].prompt_ids

    def _differences(self, prompts: Mapping[str, Prompt]) -> tuple[float, str]:
        """The largest difference of logits, and where it is."""
        worst, where = 0.0, ""
        dictation = ForcedDecoder(self._loaded.model)
        for key, prompt in prompts.items():
            stock = self._stock.answers[key]
            start = prompt.visual[-1][1]
            behind = len(prompt) - start
            tail = stock.prompt_ids[len(stock.prompt_ids) - behind :]
            written = stock.token_ids[:-1]
            stepped = dictation.logits(prompt.until(start), [*tail, *written])
            whole = dictation.logits(prompt, written)
            for logits, skipped in ((stepped, 0), (whole, behind)):
                found, at = largest_difference(logits, stock.logits[skipped:])
                if found >= worst:
                    worst, where = found, f", {skipped + at} tokens behind the image of {key}"
        return worst, where

    def _same_answers(self, answers: Mapping[str, Answer]) -> dict[str, int]:
        """Tokens and answers that are stock's, by the names of `StockCheck`."""
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
        """Whether the two tokens at the first difference are all but equally likely to stock."""
        if first >= min(len(ours), len(stock.token_ids)):
            return False
        logits = stock.logits[len(stock.logits) - len(stock.token_ids) + first].tolist()
        had = {*stock.prompt_ids, *stock.token_ids[:first]}
        return self._tie(logits, had, (stock.token_ids[first], ours[first]))

    def _tie(self, logits: Sequence[float], had: Set[int], tokens: tuple[int, int]) -> bool:
        """Whether two tokens are all but equally likely, of which some were `had` before."""
        dtype = self._job.recipe.model.dtype
        if dtype not in PRECISION:
            return False
        penalty = self._job.recipe.generation.repetition_penalty or 1.0
        a, b = (_penalised(logits[token], penalty if token in had else 1.0) for token in tokens)
        step = PRECISION[dtype] * 2.0 ** (math.frexp(max(abs(a), abs(b)))[1] - 1)
        return abs(a - b) <= STEPS * step

    def batched_and_alone(self, requests: Sequence[Request]) -> list[_Pair]:
        """As the recipe says: what is answered, in a batch and one by one."""
        engine = self._engine_as_configured()
        together = {answer.request.row_key: answer for answer in engine.stream(requests)}
        for answer in together.values():
            self._note(answer.request, answer.status, answer.error)
        pairs = []
        for request in requests:
            if together[request.row_key].error is not None:
                continue
            engine.clear_cache()  # or its image would be the one that was encoded in the batch
            (alone,) = engine.stream([request])
            self._note(request, alone.status, alone.error)
            pairs.append(_Pair(request, together[request.row_key].token_ids, alone.token_ids))
        self._end(engine)
        return pairs

    def compare_batches(self, pairs: Sequence[_Pair]) -> int | None:
        """Near ties among answers that differ; any other difference is a failure.

        None where differences are only counted: small ones of logits draw other tokens anywhere.
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
                told = f"answered otherwise in a batch than alone, from token {pair.first} on"
                self._note(pair.request, Status.FAILED, told)
        return ties

    def _engine_as_configured(self) -> Engine:
        gc.collect()  # the engine before had a KV cache of its own
        return Engine(self._loaded, self._job.recipe, self._job.cluster)

    def _ties_alone(self, engine: Engine, pair: _Pair) -> bool:
        """Whether the two tokens at the first difference are all but equally likely alone."""
        first = pair.first
        if first is None or first >= min(len(pair.batched), len(pair.alone)):
            return False
        prompt, common = engine.prompts([pair.request])[0], pair.alone[:first]
        logits = ForcedDecoder(self._loaded.model).logits(prompt, common)[-1].tolist()
        had = {*prompt.token_ids, *common}
        return self._tie(logits, had, (pair.batched[first], pair.alone[first]))

    def _note(self, request: Request, status: Status, message: str | None) -> None:
        """A row that cannot be answered is left out; one that could have been is a failure."""
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
        """Whether none does."""
        return self.first is None


def _uncompressed(recipe: Recipe) -> Recipe:
    """Everything, packed as stock packs it, and answered as stock is asked to."""
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
    """Index of the first token that differs, one of which may be missing; None where none does."""
    for index, (a, b) in enumerate(zip(ours, stock, strict=False)):
        if a != b:
            return index
    return None if len(ours) == len(stock) else min(len(ours), len(stock))


def _penalised(logit: float, penalty: float) -> float:
    return logit * penalty if logit < 0 else logit / penalty


def _shown(ends: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ends))) or "none"


def _host_peak() -> int:
    """Most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""`Engine`: a loaded model that answers requests. It knows no Ray, no files and no shards.

Four things run at once: a thread reads requests, several more decode and tile images, the vision
side (`gc2ray.engine.prompt_builder`) encodes and compresses a batch, and the decoder works on its
prompts. On a GPU the vision side has a stream and a thread of its own and runs one batch ahead; on
a CPU it takes turns with the decoder, as both need all cores. The engine waits only when none of
them has anything to do; that time is counted (`totals`). Answers come as they finish, exactly one
for every request.

A failure is recorded in the answer of the row that causes it (`gc2ray.engine.request_state`); a
lost device raises `EngineDead`.

Not covered: several prompts in one request.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from gc2ray.compression.base import Compressor
from gc2ray.compression.policy import policies_of
from gc2ray.core.config.compression import CompressionConfig, check_suits
from gc2ray.core.config.job import Cluster
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, ConfigError, EngineDead, Status
from gc2ray.core.records import RECIPES_POLICY, Answer, Request
from gc2ray.core.stats import RunStats
from gc2ray.engine.batch_sizes import BatchSizes, check_weights_fit, derive_batch_sizes
from gc2ray.engine.decoding.continuous_batching import ContinuousBatchDecoder
from gc2ray.engine.decoding.decoder import Completion, Decoder
from gc2ray.engine.decoding.hf_generate import GenerateDecoder
from gc2ray.engine.decoding.scheduler import DecodeLimits
from gc2ray.engine.device import (
    EnergyMeter,
    Memory,
    device_name,
    gpu_uuid,
    memory,
    own_device,
)
from gc2ray.engine.prefetch import InlineExecutor, Prefetcher
from gc2ray.engine.prompt_builder import PromptBuilder
from gc2ray.engine.request_state import RequestState, device_lost, failure_from, views_of
from gc2ray.models import loading
from gc2ray.models.adapter import LoadedModel, ModelAdapter
from gc2ray.models.base import Prompt
from gc2ray.models.chat_template import ChatPrompt
from gc2ray.models.checkpoint.cache import Tick
from gc2ray.models.checkpoint.fetch import fetch_metadata, fetch_model
from gc2ray.models.flops import AnswerTokens, demand_of
from gc2ray.models.llama import LanguageModel, unsupported

ERROR_CHARACTERS = 300
"""Longest error of an answer."""

log = logging.getLogger(__name__)


class Engine:
    """Answers requests with one model and one compression method.

    Args:
        loaded: The model.
        recipe: Prompts, compression and generation.
        cluster: Batch sizes and threads.
        compressor: Replaces the recipe's, for experiments with methods that no recipe names.
        policies: Further compression policies that requests may name.

    Raises:
        ConfigError: The model's decoder cannot place tokens as the recipe asks, or a method cannot
            compress the model's images.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        recipe: Recipe,
        cluster: Cluster,
        compressor: Compressor | None = None,
        policies: Mapping[str, CompressionConfig] | None = None,
    ) -> None:
        self._adapter: ModelAdapter = loaded.adapter
        self._chat = ChatPrompt(loaded.processor, loaded.adapter.family.markers)
        self._recipe = recipe
        self._sizes = derive_batch_sizes(
            cluster, self._adapter.needs(), memory(self._adapter.device)
        )
        self._policies = policies_of(recipe, policies or {})
        if compressor is not None:
            own = self._policies[RECIPES_POLICY]
            self._policies[RECIPES_POLICY] = replace(own, compressor=compressor)
        self._sampling = recipe.generation
        self._model = loaded.model
        self._check_positions()
        for policy in self._policies.values():
            check_suits(policy.compressor.name, loaded.model.config.model_type)
        self._end_tokens = loaded.end_tokens
        self._prompt_builder = PromptBuilder(
            self._adapter, self._chat, recipe, self._policies, self._sizes.cached_image_bytes
        )
        self._open: dict[int, RequestState] = {}
        self._prefetcher: Prefetcher[Request, RequestState] | None = None
        self._tags = 0
        self.device = device_name(self._adapter.device)
        self.model_digest = loaded.digest
        self.model_shape = self._adapter.shape
        self._input_starved_ns = 0
        self._energy = EnergyMeter(gpu_uuid(self._adapter.device))

    def _check_positions(self) -> None:
        """Refuse original positions for a language model that the native decoder does not run."""
        reason = unsupported(self._model)
        original = any(p.packing.positions == "original" for p in self._policies.values())
        if original and reason is not None:
            raise ConfigError(
                "recipe.compression.positions: original positions need the native decoder, and "
                f"{reason}; use compact positions for this model"
            )

    @cached_property
    def _decoder(self) -> Decoder:
        """Made when it is first used: its KV cache takes most of a GPU."""
        return _build_decoder(self._model, self._sizes, self._end_tokens)

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answer requests, in completion order.

        Args:
            requests: Read a little ahead, on a thread of its own. While it blocks, the engine works
                on the requests that it has.

        Raises:
            EngineDead: The device is lost, or a row was lost in the engine.
        """
        ahead = max(2, self._sizes.views_per_batch // 2)
        threads = self._sizes.image_threads
        batch: list[RequestState] = []
        ready: deque[RequestState] = deque()
        encoding: Future[list[RequestState]] | None = None
        with (
            Prefetcher(requests, self._prompt_builder.open, threads=threads, ahead=ahead) as opened,
            self._vision_executor() as vision,
        ):
            self._prefetcher = opened
            while True:
                self._fill(batch, opened)
                if encoding is None and not ready and self._worth_encoding(batch):
                    encoding, batch = vision.submit(self._prompt_builder.encode, batch), []
                if encoding is not None and (encoding.done() or not len(self._decoder)):
                    ready.extend(encoding.result())
                    encoding = None
                yield from self._hand_over(ready)
                if len(self._decoder):
                    yield from self._decode()
                elif not batch and not ready and encoding is None:
                    self._check_nothing_lost()
                    if opened.ended:
                        return
                    self._wait(opened)

    def requeue(self, request: Request) -> None:
        """Add a request to the running `stream`, between two of its answers.

        Raises:
            RuntimeError: No stream is running.
        """
        if self._prefetcher is None:
            raise RuntimeError("requeue needs a running stream of answers")
        self._prefetcher.add(request)

    def _vision_executor(self) -> Executor:
        """Encodes batches: beside the decoder on a GPU, in turn with it on a CPU."""
        if self._adapter.device.type == "cuda":
            return ThreadPoolExecutor(1, "gc2ray-vision")
        return InlineExecutor()

    def _fill(self, batch: list[RequestState], opened: Prefetcher[Request, RequestState]) -> None:
        """Add rows whose images are decoded, up to a whole batch."""
        while views_of(batch) < self._sizes.views_per_batch:
            row = opened.take()
            if row is None:
                return
            batch.append(row)

    def _worth_encoding(self, batch: Sequence[RequestState]) -> bool:
        """Whether the batch is whole, or the decoder could start a part of it at once."""
        whole = views_of(batch) >= self._sizes.views_per_batch
        return bool(batch) and (whole or self._decoder.wants_more)

    def _hand_over(self, ready: deque[RequestState]) -> Iterator[Answer]:
        """Submit prompts while the decoder takes them, and answer rows that failed."""
        while ready:
            row = ready[0]
            if row.prompt is not None and not self._submitted(row, row.prompt):
                return
            ready.popleft()
            if row.failure is not None:
                yield self._failed(row)

    def _wait(self, opened: Prefetcher[Request, RequestState]) -> None:
        """Wait for the next row, and count the time once the first row was decoded."""
        before = opened.waited_ns
        opened.wait()
        if self._tags and not opened.ended:
            self._input_starved_ns += opened.waited_ns - before

    def _check_nothing_lost(self) -> None:
        """Rows without an answer must be in the decoder when nothing else is running."""
        if self._open and not len(self._decoder):
            raise EngineDead(f"the decoder lost {len(self._open)} rows")

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """The language model's input for requests; for parity checks.

        Raises:
            BadRow: One of them cannot be answered.
        """
        rows = self._prompt_builder.encode(
            [self._prompt_builder.open(request) for request in requests]
        )
        for row in rows:
            if row.failure is not None:
                raise row.failure
        return [row.prompt for row in rows if row.prompt is not None]

    def clear_cache(self) -> None:
        """Clear all caches, so that the same rows again cost as much as the first time."""
        self._prompt_builder.clear_cache()
        if "_decoder" in vars(self):
            self._decoder.clear_cache()

    def totals(self) -> RunStats:
        """Totals since the engine was made that belong to no row: idle time, steps, energy, memory.

        Energy and peak memory are 0 where the device does not report them. Of a GPU that workers
        share, each counts its share.
        """
        device = self._adapter.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return RunStats(
            input_starved_ns=self._input_starved_ns,
            oom_splits=self._decoder.oom_splits,
            decode_steps=self._decoder.steps,
            energy_millijoules=int(self._energy.millijoules() * self._sizes.gpu_share),
            peak_device_bytes=int(peak),
        )

    def _submitted(self, row: RequestState, prompt: Prompt) -> bool:
        """Whether the decoder took the prompt, or never will (then the row has its `failure`)."""
        seed = self._recipe.generation.mixed(row.request.seed)
        sampling = self._sampling.with_seed(seed)
        try:
            if not self._decoder.submit(self._tags + 1, prompt, sampling):
                return False
        except BadRow as error:
            row.failure = error
            return True
        if prompt.embeds.is_cuda:  # made on another stream: keep its memory until ours is done
            prompt.embeds.record_stream(torch.cuda.current_stream(prompt.embeds.device))
        self._tags += 1
        self._open[self._tags] = row
        row.prompt = None  # the decoder has it
        return True

    def _decode(self) -> Iterator[Answer]:
        """Run one step of the decoder and yield the answers that it finishes."""
        try:
            completions = self._decoder.step()
        except torch.AcceleratorError as error:
            raise device_lost(error) from error
        for completion in completions:
            row = self._open.pop(completion.tag)
            if completion.error is not None:
                row.failure = failure_from(completion.error)
                row.oom_splits += completion.oom_splits
                yield self._failed(row)
            else:
                yield self._answered(row, completion)

    def _answered(self, row: RequestState, completion: Completion) -> Answer:
        images = row.cached_images
        encoded = [image for image, new in zip(images, row.encoded, strict=True) if new]
        text_tokens = len(row.token_ids) - len(images)  # without the images' placeholders
        tokens = AnswerTokens(
            views=sum(image.encoded_views for image in encoded),
            projected=sum(image.packed_tokens for image in encoded),
            prompt=text_tokens + sum(image.packed_tokens for image in images),
            output=len(completion.token_ids),
            shared=completion.shared,
        )
        before = images[: row.prefix_images]  # what a shared beginning of the prompt ends behind
        dropped = sum(image.full_length - image.packed_tokens for image in before)
        uncompressed = replace(
            tokens,
            projected=sum(image.full_length for image in encoded),
            prompt=text_tokens + sum(image.full_length for image in images),
            shared=tokens.shared and tokens.shared + dropped,
        )
        shape, per_token = self.model_shape, self._adapter.kv_bytes_per_token
        stages = {"prefill": completion.prefill_ns, "generate": completion.generate_ns}
        masks = tuple(mask for image in images for mask in image.kept_mask)
        return Answer(
            request=row.request,
            status=Status.OK,
            **self._compression_of(row.request),
            answer=self._chat.decode(completion.token_ids),
            finish_reason=completion.finish_reason,
            prompt_tokens=tokens.prompt,
            output_tokens=tokens.output,
            visual_tokens_full=sum(image.full_tokens for image in images),
            visual_tokens_kept=sum(image.kept_tokens for image in images),
            newline_tokens=sum(image.newlines for image in images),
            newline_tokens_full=sum(image.full_newlines for image in images),
            kept_per_view=tuple(image.kept_per_view for image in images),
            kv_bytes=(tokens.prompt + tokens.output) * per_token,
            kv_bytes_full=(uncompressed.prompt + tokens.output) * per_token,
            stage_ns={**row.stage_ns, **stages},
            device=self.device,
            token_ids=completion.token_ids,
            images_encoded=len(encoded),
            images_shared=len(images) - len(encoded),
            prompt_tokens_shared=completion.shared,
            oom_splits=row.oom_splits + completion.oom_splits,
            full_per_view=tuple(image.full_per_view for image in images),
            kept_mask=masks if row.request.is_audited else None,
            demand=demand_of(shape, tokens),
            demand_full=demand_of(shape, uncompressed),
        )

    def _compression_of(self, request: Request) -> dict[str, Any]:
        """The answer's fields on its compression."""
        policy = self._policies[request.policy]
        return {"method": policy.compressor.name, "retention_requested": policy.retention_requested}

    def _failed(self, row: RequestState) -> Answer:
        failure = row.failure or BadRow(Status.FAILED, "failed without a reason")
        return Answer(
            request=row.request,
            status=failure.status,
            **self._compression_of(row.request),
            error=failure.message[:ERROR_CHARACTERS],
            stage_ns=row.stage_ns,
            device=self.device,
            is_retryable=row.is_retryable,
            oom_splits=row.oom_splits,
        )


def _build_decoder(model: Any, sizes: BatchSizes, end_tokens: tuple[int, ...]) -> Decoder:
    """Continuous batching, or stock `generate` for language models that it does not support."""
    reason = unsupported(model)
    if reason is not None:
        log.warning("decoding with stock generate, which is slower: %s", reason)
        return GenerateDecoder(model, max_tokens=sizes.kv_tokens, eos=end_tokens)
    limits = DecodeLimits(sizes.kv_tokens, sizes.prefill_tokens, sizes.live_rows, sizes.graph_steps)
    return ContinuousBatchDecoder(LanguageModel(model), limits, eos=end_tokens)


def load_engine(recipe: Recipe, cluster: Cluster, tick: Tick = lambda: None) -> Engine:
    """Load the recipe's model on the GPU that this process was given, else on the CPU.

    Raises:
        ConfigError: The model cannot be loaded.
        OSError: It could not be fetched now.
    """
    return Engine(load_recipe_model(recipe, cluster, tick), recipe, cluster)


def load_recipe_model(recipe: Recipe, cluster: Cluster, tick: Tick = lambda: None) -> LoadedModel:
    """The recipe's model; on a CPU, torch takes the threads that the cluster allows a worker.

    Args:
        recipe: The recipe that names the model.
        cluster: Threads and share of a GPU.
        tick: Called on progress while the model is fetched.

    Raises:
        ConfigError: The model cannot be loaded.
        OSError: It could not be fetched now.
    """
    device = own_device()
    if device == "cpu":
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    else:  # a cap, so that workers on one GPU cannot take from each other
        torch.cuda.set_per_process_memory_fraction(min(1.0, cluster.gpus_per_worker or 1.0))
        _check_fits(recipe, memory(torch.device(device)))
    fetched = fetch_model(recipe.model, tick=tick)
    loaded = loading.load(
        str(fetched.directory),
        revision=None,
        dtype=recipe.model.dtype,
        device=device,
        taken_over=recipe.taken_over(),
    )
    return replace(loaded, digest=fetched.digest)


def _check_fits(recipe: Recipe, device: Memory) -> None:
    """Refuse a model larger than the device, by its small files alone: weights are not fetched.

    Raises:
        ConfigError: It is larger, or cannot be loaded.
    """
    small = str(fetch_metadata(recipe.model))
    dtype, taken_over = recipe.model.dtype, recipe.taken_over()
    metadata = loading.load_metadata(small, dtype=dtype, taken_over=taken_over)
    check_weights_fit(metadata.shape.needs(), device)

"""`Engine`: a loaded model that answers rows. Knows no Ray, no files, no shards.

Four things go on at once: a thread reads requests, some more decode and tile images, the vision
side encodes and compresses a batch (on a GPU on a stream and a thread of its own, one batch ahead;
on a CPU it would only take the decoder's cores, and takes its turn), and the decoder works on the
prompts that it has. The engine waits only when none of them has anything to do; that time is
counted (`totals`). Answers come as they finish; one comes back for every request, whatever
happens to it.

Rows that show the same image share it: see `gc2ray.pictures`. Trouble with a batch is tried again
on its halves, so in the end it belongs to one image or row, whose answer says so; a device that is
lost raises `EngineDead`.

Not covered: several images or prompts in one request.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch

from gc2ray import families
from gc2ray.compression.compressor import Compressor
from gc2ray.config import Cluster, Recipe
from gc2ray.decoding.decoder import Completion, Decoder, end_tokens
from gc2ray.decoding.generate import GenerateDecoder
from gc2ray.decoding.language_model import LanguageModel, unsupported
from gc2ray.decoding.native import NativeDecoder, Room
from gc2ray.errors import BadRow, EngineDead, ShardError, Status
from gc2ray.families.family import Family, Loaded
from gc2ray.feed import Feed, Inline
from gc2ray.images import read_bytes, tiles_of
from gc2ray.pictures import Picture, Pictures, picture_key
from gc2ray.prompts import ChatPrompt
from gc2ray.records import Answer, Request, Sampling
from gc2ray.sizing import Memory, Sizes, cores, free_host_bytes, sizes
from gc2ray.stats import RunStats, apportion
from gc2ray.views import Prompt

MESSAGE_CHARACTERS = 300

log = logging.getLogger(__name__)


class _Troubled(Protocol):
    """A row or a picture: what can be blamed."""

    trouble: BadRow | None
    retry: bool


U = TypeVar("U", bound=_Troubled)


@dataclass(eq=False)
class _Row:
    """A request on its way through the engine."""

    request: Request
    picture: Picture | None = None
    shares: bool = False
    token_ids: list[int] = field(default_factory=list)
    prompt: Prompt | None = None
    trouble: BadRow | None = None
    retry: bool = False
    stage_ns: dict[str, int] = field(default_factory=dict)


class Engine:
    """Answers requests with one model and one compression method.

    Args:
        loaded: The model.
        recipe: What to compute.
        cluster: Batch sizes and threads.
        compressor: In place of the recipe's, for experiments with methods that no recipe names.
    """

    def __init__(
        self,
        loaded: Loaded,
        recipe: Recipe,
        cluster: Cluster,
        compressor: Compressor | None = None,
    ) -> None:
        self._family: Family = loaded.family
        self._chat = ChatPrompt(loaded.processor)
        self._recipe = recipe
        self._sizes = sizes(cluster, self._family.needs(), memory(self._family.device))
        self._compressor = compressor or recipe.compression.build()
        self._packing = recipe.compression.packing()
        self._images = recipe.input.image_policy()
        self._sampling = Sampling(**recipe.generation.model_dump())
        self._model = loaded.model
        self._pictures = Pictures(self._sizes.remembered_bytes)
        self._open: dict[int, _Row] = {}
        self._tags = 0
        self._stream: torch.cuda.Stream | None = None
        self.device = device_name(self._family.device)
        self._starved_ns = 0

    @cached_property
    def _decoder(self) -> Decoder:
        """Made when it is first wanted: its KV cache takes most of a GPU."""
        return _decoder(self._model, self._sizes)

    def stream(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """Answer requests, in completion order.

        Args:
            requests: Read on a thread of its own, a little ahead. Where it blocks, the engine goes
                on with what it has.

        Raises:
            EngineDead: The device is lost, or a row got lost in the engine.
        """
        ahead = max(2, self._sizes.views_per_batch // 2)
        threads = self._sizes.image_threads
        batch: list[_Row] = []
        ready: deque[_Row] = deque()
        encoding: Future[list[_Row]] | None = None
        with (
            Feed(requests, self._open_image, threads=threads, ahead=ahead) as feed,
            self._beside() as vision,
        ):
            while True:
                self._fill(batch, feed)
                if encoding is None and not ready and self._worth_encoding(batch):
                    encoding, batch = vision.submit(self._encode, batch), []
                if encoding is not None and (encoding.done() or not len(self._decoder)):
                    ready.extend(encoding.result())
                    encoding = None
                yield from self._hand_over(ready)
                if len(self._decoder):
                    yield from self._decode()
                elif not batch and not ready and encoding is None:
                    self._check_nothing_lost()
                    if feed.ended:
                        return
                    self._starve(feed)

    def _beside(self) -> Executor:
        """Where batches are encoded: beside the decoder on a GPU, in turn with it on a CPU."""
        if self._family.device.type == "cuda":
            return ThreadPoolExecutor(1, "gc2ray-vision")
        return Inline()

    def _fill(self, batch: list[_Row], feed: Feed[Request, _Row]) -> None:
        """Take rows whose images are decoded, up to a whole batch."""
        while _views(batch) < self._sizes.views_per_batch:
            row = feed.take()
            if row is None:
                return
            batch.append(row)

    def _worth_encoding(self, batch: Sequence[_Row]) -> bool:
        """A whole batch is; a part of one where the decoder could start it at once."""
        whole = _views(batch) >= self._sizes.views_per_batch
        return bool(batch) and (whole or self._decoder.hungry)

    def _hand_over(self, ready: deque[_Row]) -> Iterator[Answer]:
        """Give prompts to the decoder while it takes them; rows that failed are answered."""
        while ready:
            row = ready[0]
            if row.prompt is not None and not self._submitted(row, row.prompt):
                return
            ready.popleft()
            if row.trouble is not None:
                yield self._failed(row)

    def _starve(self, feed: Feed[Request, _Row]) -> None:
        before = feed.waited_ns
        feed.wait()
        if self._tags and not feed.ended:
            self._starved_ns += feed.waited_ns - before

    def _check_nothing_lost(self) -> None:
        """Open rows are in the decoder, or they will never come out."""
        if self._open and not len(self._decoder):
            raise EngineDead(f"{len(self._open)} rows went into the decoder and did not come out")

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """What the language model would read for requests; for parity checks.

        Raises:
            BadRow: One of them cannot be answered.
        """
        rows = self._encode([self._open_image(request) for request in requests])
        for row in rows:
            if row.trouble is not None:
                raise row.trouble
        return [row.prompt for row in rows if row.prompt is not None]

    def forget(self) -> None:
        """Forget all that rows shared, so that the same rows again cost what they cost first."""
        self._pictures = Pictures(self._sizes.remembered_bytes)
        if "_decoder" in vars(self):
            self._decoder.forget()

    def totals(self) -> RunStats:
        """What belongs to no row, since the engine was made: starvation, memory and its shortage.

        The largest allocation is 0 where the device does not tell.
        """
        device = self._family.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return RunStats(
            starved_ns=self._starved_ns,
            halvings=self._decoder.halvings,
            peak_device_bytes=int(peak),
        )

    def _attempt(self, things: Sequence[U], work: Callable[[Sequence[U]], None]) -> None:
        """The row border: do the work, on halves where it fails, and blame the last one."""
        if not things:
            return
        try:
            work(things)
        except Exception as error:  # noqa: BLE001 - whatever one row can cause belongs to that row
            trouble, retry = _trouble(error), isinstance(error, ShardError)
        else:
            return
        if len(things) == 1:
            things[0].trouble, things[0].retry = trouble, retry
            return
        half = len(things) // 2
        self._attempt(things[:half], work)
        self._attempt(things[half:], work)

    def _open_image(self, request: Request) -> _Row:
        """Read, and decode and tile unless another row does; runs on a thread."""

        def work(_: Sequence[_Row]) -> None:
            if request.fault is not None:
                raise request.fault
            if len(request.images) != 1 or len(request.prompts) != 1:
                raise BadRow(Status.FAILED, "a request has one image and one prompt, for now")
            data = read_bytes(request.images[0], self._images)
            reads_prompt = self._compressor.reads_prompt
            key = picture_key(data, request.prompts[0] if reads_prompt else None)
            row.picture, new = self._pictures.find(key)
            row.shares = not new
            if new:
                self._decode_image(row.picture, request, data)

        started = time.perf_counter_ns()
        row = _Row(replace(request, images=()))  # encoded bytes are not needed any more
        self._attempt([row], work)
        row.stage_ns["image"] = time.perf_counter_ns() - started
        return row

    def _decode_image(self, picture: Picture, request: Request, data: bytes) -> None:
        def work(pictures: Sequence[Picture]) -> None:
            ref = request.images[0]
            pictures[0].tiles = tiles_of(data, ref, self._family.anyres, self._images)

        try:
            self._attempt([picture], work)
        finally:
            picture.decoded.set()

    @torch.inference_mode()
    def _encode(self, rows: list[_Row]) -> list[_Row]:
        """From tiles to prompts, all rows of a batch; trouble is noted in them."""
        stream = self._vision_stream()
        with torch.cuda.stream(stream):  # nothing on a CPU
            payers: dict[Picture, _Row] = {}
            for row in rows:
                if row.picture is not None:
                    row.picture.decoded.wait()
                    if row.picture.tiles is not None:
                        payers.setdefault(row.picture, row)
            self._attempt(list(payers), lambda pictures: self._encode_pictures(pictures, payers))
            for row in rows:
                if row.picture is not None and row.picture.trouble is not None:
                    self._pictures.forget(row.picture)
                    row.trouble, row.retry = row.picture.trouble, row.picture.retry
            self._attempt([row for row in rows if row.trouble is None], self._embed)
            self._now()  # what was made is complete for whoever takes it
        return rows

    def _encode_pictures(self, pictures: Sequence[Picture], payers: dict[Picture, _Row]) -> None:
        """Tower, selection, projection; time is put on the rows that brought the pictures."""
        tiles = [picture.tiles for picture in pictures if picture.tiles is not None]
        started = self._now()
        views = self._family.encode(tiles, [self._seed(picture.seed) for picture in pictures])
        encoded = self._now()
        selections = self._packing.apply(views, self._compressor.many(views))
        places = self._packing.places(views, selections)
        packed = self._family.pack(views, selections)
        compressed = self._now()
        rows = [payers[picture] for picture in pictures]
        _share(rows, "encode", encoded - started, [picture.views for picture in pictures])
        # Copies of their own: a part of the batch would keep all of it in memory. All are made
        # before any picture counts as encoded: a batch that fails here is tried again in halves.
        copies = [part.clone() for part in packed]
        for index, picture in enumerate(pictures):
            picture.count(views[index], selections[index])
            picture.packed, picture.places = copies[index], places[index]
            picture.tiles = None
            self._pictures.keep(picture)
        full = [picture.full_tokens for picture in pictures]
        _share(rows, "compress", compressed - encoded, full)

    def _embed(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            picture = row.picture
            if picture is None or picture.packed is None:
                raise RuntimeError(f"{row.request.row_key} has no picture")
            row.token_ids = self._chat.encode(row.request.prompts[0])
            prompt = self._family.embed(row.token_ids, [picture.packed], [picture.places])
            row.trouble = self._too_long(prompt)
            if row.trouble is None:
                row.prompt = replace(prompt, prefix_key=_prefix_key(row, picture, prompt))

    def _too_long(self, prompt: Prompt) -> BadRow | None:
        new, limit = self._recipe.generation.max_new_tokens, self._family.max_positions
        positions = prompt.positions
        stop = len(prompt) if positions is None else int(positions.max()) + 1
        if stop + new <= limit:
            return None
        placed = "" if positions is None else f" at positions up to {stop - 1}"
        counts = f"{len(prompt)} prompt tokens{placed} and {new} new ones"
        counts += f"; the model reads at most {limit}"
        return BadRow(Status.TOO_LONG, counts)

    def _submitted(self, row: _Row, prompt: Prompt) -> bool:
        """Whether the decoder took a prompt, or will never take it; then `trouble` says why."""
        sampling = replace(self._sampling, seed=self._seed(row.request.seed))
        try:
            if not self._decoder.submit(self._tags + 1, prompt, sampling):
                return False
        except BadRow as error:
            row.trouble = error
            return True
        if prompt.embeds.is_cuda:  # made on another stream: its memory is not free before we are
            prompt.embeds.record_stream(torch.cuda.current_stream(prompt.embeds.device))
        self._tags += 1
        self._open[self._tags] = row
        row.prompt = None  # the decoder has it
        return True

    def _decode(self) -> Iterator[Answer]:
        """One step of the decoder: the answers that it finishes."""
        try:
            completions = self._decoder.step()
        except torch.AcceleratorError as error:
            raise _lost(error) from error
        for completion in completions:
            row = self._open.pop(completion.tag)
            if completion.error is not None:
                row.trouble = _trouble(completion.error)
                yield self._failed(row)
            else:
                yield self._answered(row, completion)

    def _answered(self, row: _Row, completion: Completion) -> Answer:
        picture = row.picture
        if picture is None:
            raise EngineDead(f"{row.request.row_key} was answered without its picture")
        text_tokens = len(row.token_ids) - 1  # without the image's placeholder
        kept, output = sum(picture.kept_per_view), len(completion.token_ids)
        prompt_tokens = text_tokens + kept + picture.newlines
        full = text_tokens + picture.full_tokens + picture.full_newlines
        per_token = self._family.kv_bytes_per_token
        stages = {"prefill": completion.prefill_ns, "generate": completion.generate_ns}
        return Answer(
            request=row.request,
            status=Status.OK,
            method=self._compressor.name,
            retention_requested=self._recipe.compression.retention_requested,
            answer=self._chat.decode(completion.token_ids),
            finish_reason=completion.finish_reason,
            prompt_tokens=prompt_tokens,
            output_tokens=output,
            visual_tokens_full=picture.full_tokens,
            visual_tokens_kept=kept,
            newline_tokens=picture.newlines,
            newline_tokens_full=picture.full_newlines,
            kept_per_view=(picture.kept_per_view,),
            kv_bytes=(prompt_tokens + output) * per_token,
            kv_bytes_full=(full + output) * per_token,
            stage_ns={**row.stage_ns, **stages},
            device=self.device,
            token_ids=completion.token_ids,
            image_shared=row.shares,
            prompt_tokens_shared=completion.shared,
        )

    def _failed(self, row: _Row) -> Answer:
        trouble = row.trouble or BadRow(Status.FAILED, "failed without a reason")
        return Answer(
            request=row.request,
            status=trouble.status,
            method=self._compressor.name,
            retention_requested=self._recipe.compression.retention_requested,
            error=trouble.message[:MESSAGE_CHARACTERS],
            stage_ns=row.stage_ns,
            device=self.device,
            retry=row.retry,
        )

    def _seed(self, seed: int) -> int:
        """A row's or an image's seed, mixed with the recipe's."""
        return seed ^ self._recipe.generation.seed

    def _vision_stream(self) -> torch.cuda.Stream | None:
        """Where the vision side runs, beside the decoder; None on a CPU."""
        if self._family.device.type != "cuda":
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._family.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _now(self) -> int:
        """Nanoseconds, once this thread's stream has done what it was asked to."""
        if self._family.device.type == "cuda":
            torch.cuda.current_stream(self._family.device).synchronize()
        return time.perf_counter_ns()


def _decoder(model: Any, found: Sizes) -> Decoder:
    """Continuous batching, or stock `generate` for language models that it does not know."""
    reason = unsupported(model)
    if reason is not None:
        log.warning("decoding with stock generate, which is slower: %s", reason)
        return GenerateDecoder(model, max_tokens=found.kv_tokens)
    room = Room(found.kv_tokens, found.prefill_tokens, found.live_rows, found.burst)
    return NativeDecoder(LanguageModel(model), room, eos=end_tokens(model))


def load_engine(recipe: Recipe, cluster: Cluster) -> Engine:
    """Load the recipe's model on the GPU that this process was given, else on the CPU.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    return Engine(load_model(recipe, cluster), recipe, cluster)


def load_model(recipe: Recipe, cluster: Cluster) -> Loaded:
    """The recipe's model; on a CPU, torch takes the threads that the cluster allows a worker.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, int(cluster.cpus_per_worker)))
    else:  # a cap, so that workers on one GPU cannot take from each other
        torch.cuda.set_per_process_memory_fraction(min(1.0, cluster.gpus_per_worker or 1.0))
    model = recipe.model
    model.check()
    return families.load(model.path, revision=model.revision, dtype=model.dtype, device=device)


def memory(device: torch.device) -> Memory:
    """All memory of a GPU; what is free of a host's."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Memory(is_gpu=True, total_bytes=total, cores=cores())
    return Memory(is_gpu=False, total_bytes=free_host_bytes(), cores=cores())


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _views(rows: Sequence[_Row]) -> int:
    """Views that rows bring; one that brings none counts as one, so that batches of them end too.

    Rows that show the same picture bring it once, but are counted each: batches stay bounded.
    """
    return sum(max(row.picture.views if row.picture else 0, 1) for row in rows)


def _share(rows: Sequence[_Row], stage: str, total_ns: int, weights: Sequence[int]) -> None:
    for row, share in zip(rows, apportion(total_ns, weights), strict=True):
        row.stage_ns[stage] = share


def _prefix_key(row: _Row, picture: Picture, prompt: Prompt) -> str | None:
    """The same for prompts that begin with the same text and picture; None where nobody shares."""
    if picture.rows < 2:
        return None
    before = row.token_ids[: prompt.visual[0][0]]
    text = hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()
    return f"{picture.key}/{text}"


def _lost(error: torch.AcceleratorError) -> EngineDead:
    return EngineDead(f"the device is lost: {error}")


def _trouble(error: Exception) -> BadRow:
    """What an exception means for the row that caused it.

    Raises:
        EngineDead: It means the device.
    """
    if isinstance(error, BadRow):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return BadRow(Status.OUT_OF_MEMORY, "the device has not enough memory for this row alone")
    if isinstance(error, torch.AcceleratorError):
        raise _lost(error) from error
    return BadRow(Status.FAILED, f"{type(error).__name__}: {' '.join(str(error).split())}")

"""`Engine`: a loaded model that answers rows. Knows no Ray, no files, no shards.

Threads decode and tile images a little ahead; the calling thread encodes, compresses and packs
whole batches, hands prompts to the decoder, and yields answers as they finish. One answer comes
back for every request, whatever happens to it.

Trouble with a batch is tried again on its halves, so in the end it belongs to one row, whose answer
says so; a device that is lost raises `EngineDead`.

Not covered: overlap of the accelerator's own stages, sharing of images between rows, several
images or prompts in one row.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

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
from gc2ray.images import load_tiles
from gc2ray.prompts import ChatPrompt
from gc2ray.records import Answer, Request, Sampling
from gc2ray.stats import apportion
from gc2ray.views import Prompt, Selection, Tiles, Views

T = TypeVar("T")
MESSAGE_CHARACTERS = 300

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Row:
    """A request on its way through the engine."""

    request: Request
    tiles: Tiles | None = None
    token_ids: list[int] = field(default_factory=list)
    trouble: BadRow | None = None
    retry: bool = False
    stage_ns: dict[str, int] = field(default_factory=dict)
    kept_per_view: tuple[int, ...] = ()
    full_tokens: int = 0
    newlines: int = 0
    full_newlines: int = 0

    @property
    def views(self) -> int:
        return 0 if self.tiles is None else len(self.tiles.pixels)


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
        self._cluster = cluster
        self._compressor = compressor or recipe.compression.build()
        self._packing = recipe.compression.packing()
        self._images = recipe.input.image_policy()
        self._decoder = _decoder(loaded.model, cluster)
        self._open: dict[int, _Row] = {}
        self._tags = 0
        self.device = device_name(self._family.device)

    def stream(self, requests: Iterable[Request | None]) -> Iterator[Answer]:
        """Answer requests, in completion order.

        Args:
            requests: None among them says that no more are at hand: the engine then works on what
                it has before it asks again.

        Raises:
            EngineDead: The device is lost, or a row got lost in the engine.
        """
        with ThreadPoolExecutor(self._cluster.image_threads, "gc2ray-image") as pool:
            for batch in self._batches(self._prepared(pool, requests)):
                prompts = self._attempt([row for row in batch if not row.trouble], self._encode)
                yield from (self._failed(row) for row in batch if row.trouble)
                for row, prompt in prompts:
                    yield from self._submit(row, prompt)
                if not batch:
                    yield from self._decode()
                    self._check_nothing_lost()
            while len(self._decoder):
                yield from self._decode()
        self._check_nothing_lost()

    def _check_nothing_lost(self) -> None:
        """Open rows are in the decoder, or they will never come out."""
        if self._open and not len(self._decoder):
            raise EngineDead(f"{len(self._open)} rows went into the decoder and did not come out")

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """What the language model would read for requests; for parity checks.

        Raises:
            BadRow: One of them cannot be answered.
        """
        rows = [self._open_image(_Row(request)) for request in requests]
        prompts = self._attempt([row for row in rows if not row.trouble], self._encode)
        for row in rows:
            if row.trouble is not None:
                raise row.trouble
        return [prompt for _, prompt in prompts]

    def peak_device_bytes(self) -> int:
        """Largest allocation on the device so far; 0 where the device does not tell."""
        if self._family.device.type != "cuda":
            return 0
        return int(torch.cuda.max_memory_allocated(self._family.device))

    def _prepared(
        self, pool: ThreadPoolExecutor, requests: Iterable[Request | None]
    ) -> Iterator[_Row | None]:
        """Rows with their images decoded, in order; None where no more are at hand."""
        lookahead = max(2, self._cluster.views_per_batch // 2)
        ahead: deque[Future[_Row]] = deque()
        for request in requests:
            if request is None:
                yield from (ahead.popleft().result() for _ in range(len(ahead)))
                yield None
                continue
            ahead.append(pool.submit(self._open_image, _Row(request)))
            if len(ahead) > lookahead:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)

    def _batches(self, rows: Iterator[_Row | None]) -> Iterator[list[_Row]]:
        """Rows with about `views_per_batch` views; an empty list where no more are at hand."""
        batch: list[_Row] = []
        for row in rows:
            if row is not None:
                batch.append(row)
            if batch and (row is None or _views(batch) >= self._cluster.views_per_batch):
                yield batch
                batch = []
            if row is None:
                yield []
        if batch:
            yield batch

    def _attempt(self, rows: Sequence[_Row], work: Callable[[Sequence[_Row]], list[T]]) -> list[T]:
        """The row border: do the work on rows, on halves where it fails, and blame the last one."""
        if not rows:
            return []
        try:
            return work(rows)
        except Exception as error:  # noqa: BLE001 - whatever one row can cause belongs to that row
            trouble, retry = _trouble(error), isinstance(error, ShardError)
        if len(rows) == 1:
            rows[0].trouble, rows[0].retry = trouble, retry
            return []
        half = len(rows) // 2
        return self._attempt(rows[:half], work) + self._attempt(rows[half:], work)

    def _open_image(self, row: _Row) -> _Row:
        """Decode and tile; runs on a thread."""

        def work(rows: Sequence[_Row]) -> list[None]:
            request = rows[0].request
            if request.fault is not None:
                raise request.fault
            if len(request.images) != 1 or len(request.prompts) != 1:
                raise BadRow(Status.FAILED, "a row has one image and one prompt, for now")
            rows[0].tiles = load_tiles(request.images[0], self._family.anyres, self._images)
            return []

        started = time.perf_counter_ns()
        self._attempt([row], work)
        row.stage_ns["image"] = time.perf_counter_ns() - started
        row.request = replace(row.request, images=())  # encoded bytes are not needed any more
        return row

    @torch.inference_mode()
    def _encode(self, rows: Sequence[_Row]) -> list[tuple[_Row, Prompt]]:
        """From tiles to prompts; the accelerator's share before the decoder."""
        tiles = [row.tiles for row in rows if row.tiles is not None]
        for row in rows:
            row.token_ids = self._chat.encode(row.request.prompts[0])
        started = self._now()
        views = self._family.encode(tiles, [self._seed(row) for row in rows])
        encoded = self._now()
        selections = self._packing.apply(views, self._compressor.many(views))
        places = self._packing.places(views, selections)
        packed = self._family.pack(views, selections)
        compressed = self._now()
        _share(rows, "encode", encoded - started, [row.views for row in rows])
        for row, view, selection in zip(rows, views, selections, strict=True):
            _count(row, view, selection)
        _share(rows, "compress", compressed - encoded, [row.full_tokens for row in rows])
        prompts = [
            (row, self._family.embed(row.token_ids, [image], [known]))
            for row, image, known in zip(rows, packed, places, strict=True)
        ]
        for row, prompt in prompts:
            row.trouble = self._too_long(prompt)
        return [(row, prompt) for row, prompt in prompts if row.trouble is None]

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

    def _submit(self, row: _Row, prompt: Prompt) -> Iterator[Answer]:
        settings = self._recipe.generation
        sampling = Sampling(**settings.model_dump() | {"seed": self._seed(row)})
        row.tiles = None  # nor are pixels
        self._tags += 1
        try:
            while not self._decoder.submit(self._tags, prompt, sampling):
                yield from self._decode()
        except BadRow as error:
            row.trouble = error
            yield self._failed(row)
        else:
            self._open[self._tags] = row

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
        text_tokens = len(row.token_ids) - 1  # without the image's placeholder
        kept, output = sum(row.kept_per_view), len(completion.token_ids)
        prompt_tokens = text_tokens + kept + row.newlines
        full = text_tokens + row.full_tokens + row.full_newlines
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
            visual_tokens_full=row.full_tokens,
            visual_tokens_kept=kept,
            newline_tokens=row.newlines,
            newline_tokens_full=row.full_newlines,
            kept_per_view=(row.kept_per_view,),
            kv_bytes=(prompt_tokens + output) * per_token,
            kv_bytes_full=(full + output) * per_token,
            stage_ns={**row.stage_ns, **stages},
            device=self.device,
            token_ids=completion.token_ids,
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

    def _seed(self, row: _Row) -> int:
        return row.request.seed ^ self._recipe.generation.seed

    def _now(self) -> int:
        """Nanoseconds, once the device has done what it was asked to."""
        if self._family.device.type == "cuda":
            torch.cuda.synchronize(self._family.device)
        return time.perf_counter_ns()


def _decoder(model: Any, cluster: Cluster) -> Decoder:
    """Continuous batching, or stock `generate` for language models that it does not know."""
    reason = unsupported(model)
    if reason is not None:
        log.warning("decoding with stock generate, which is slower: %s", reason)
        return GenerateDecoder(model, max_tokens=cluster.kv_tokens)
    room = Room(cluster.kv_tokens, cluster.prefill_tokens, cluster.live_rows)
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
    model = recipe.model
    model.check()
    return families.load(model.path, revision=model.revision, dtype=model.dtype, device=device)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _views(rows: Sequence[_Row]) -> int:
    """Views of rows; a row that failed counts as one, so that batches of them end too."""
    return sum(max(row.views, 1) for row in rows)


def _share(rows: Sequence[_Row], stage: str, total_ns: int, weights: Sequence[int]) -> None:
    for row, share in zip(rows, apportion(total_ns, weights), strict=True):
        row.stage_ns[stage] = share


def _count(row: _Row, views: Views, selection: Selection) -> None:
    """Note what the compressor kept: counted, never claimed."""
    per_view = views.valid_per_view
    row.kept_per_view = selection.kept_per_view(len(per_view), views.tokens_per_view)
    row.full_tokens = sum(per_view)
    row.newlines = len(selection.source) - sum(row.kept_per_view)
    row.full_newlines = views.canvas.newlines


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

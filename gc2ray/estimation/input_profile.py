"""`InputProfile`: the sizes of an input's prompts, from footers, image headers and text.

No pixel is decoded and no weight is loaded. Inside Parquet, image headers lie in the image column,
which is therefore read for the sampled rows: blocks of rows spread over the input, or all rows.
Images that rows name by a path are fetched whole.

Figures of all rows are exact. Figures of a sample have an interval: a bootstrap over its blocks,
because rows that lie together are alike.

Not covered: images that are damaged behind their header; images shared by rows that lie far apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gc2ray.compression.geometry import Geometry
from gc2ray.compression.policy import CompressionPolicy
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, Status
from gc2ray.core.intervals import Interval, ratio
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import upright_size
from gc2ray.data.source import Source
from gc2ray.engine.image_cache import image_keys
from gc2ray.engine.sample import read_requests, refusing_unreadable_input
from gc2ray.models.base import ModelMetadata
from gc2ray.models.chat_template import ChatPrompt

SAMPLE_BLOCKS = 64
"""At most: each opens a file, and reads a row group up to where the block lies."""
REMEMBERED = 4096
"""Images that later rows of a block may share; an engine remembers no more either."""


@dataclass(frozen=True)
class ShownImage:
    """An image of a prompt.

    Attributes:
        geometry: Its views and layout.
        leading_tokens: Text tokens of the prompt before it.
        is_new: No earlier prompt of the block shows it. Where the images of a row share a budget:
            none shows the same images, as only then they are encoded once.
    """

    geometry: Geometry
    leading_tokens: int
    is_new: bool


@dataclass(frozen=True)
class PromptShape:
    """The size of a prompt for the model.

    Attributes:
        images: Its images, in order.
        text_tokens: Its other tokens.
    """

    images: tuple[ShownImage, ...]
    text_tokens: int

    @property
    def new(self) -> tuple[ShownImage, ...]:
        """Images that no earlier prompt of the block shows."""
        return tuple(image for image in self.images if image.is_new)


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Sampled rows that lie together.

    Attributes:
        rows: Number of rows.
        prompts: Their prompts by shape.
        refused: Prompts that cannot be answered, by the status that they will have.
    """

    rows: int
    prompts: Counter[PromptShape]
    refused: Counter[Status]


@dataclass(frozen=True, eq=False)
class InputProfile:
    """The sampled rows of an input.

    Attributes:
        rows: Rows of the input.
        blocks: The sample.
    """

    rows: int
    blocks: tuple[SampleBlock, ...]

    @cached_property
    def sampled_rows(self) -> int:
        """Rows of the sample."""
        return sum(block.rows for block in self.blocks)

    @property
    def is_exact(self) -> bool:
        """Whether the sample is all rows."""
        return self.sampled_rows == self.rows

    @cached_property
    def prompts(self) -> Counter[PromptShape]:
        """Prompts of the sample by shape."""
        return sum((block.prompts for block in self.blocks), Counter())

    @cached_property
    def refused(self) -> Counter[Status]:
        """Prompts of the sample that cannot be answered."""
        return sum((block.refused for block in self.blocks), Counter())

    def total(self, measure: Callable[[SampleBlock], float]) -> Interval:
        """A sum over all rows, from its value in each block; see `scaled`."""
        return self.scaled(np.array([measure(block) for block in self.blocks]))

    def scaled(self, values: np.ndarray) -> Interval:
        """A sum over all rows: exact where all were sampled, else with 95 % confidence.

        A ratio to rows, times all rows. Its spread shrinks where the sample is much of the input
        (finite population).

        Args:
            values: Value of each block, (B,).
        """
        values = values.astype(np.float64)
        if self.is_exact:
            return Interval.exactly(float(values.sum()))
        rows = np.array([block.rows for block in self.blocks], dtype=np.float64)
        each, seen = ratio(values, rows), float(values.sum())
        unseen = np.sqrt(1 - self.sampled_rows / self.rows)
        low = each.mean - unseen * (each.mean - each.low)
        high = each.mean + unseen * (each.high - each.mean)
        return Interval(max(seen, self.rows * low), self.rows * each.mean, self.rows * high)


def profile_input(
    recipe: Recipe,
    model: ModelMetadata,
    rows: int | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> InputProfile:
    """Sample rows of a recipe's input.

    Args:
        recipe: Names the input.
        model: Metadata of its model.
        rows: Size of the sample, about; None for all rows.
        tick: Called with the number of rows of each block that was read.

    Raises:
        ConfigError: The input cannot be read.
    """
    source = Source(recipe.input)
    files, _ = source.scan()
    profiler = _Profiler(recipe, model)
    total = sum(file.rows for file in files)
    blocks = []
    for span in sample_spans(files, total if rows is None else rows):
        with refusing_unreadable_input():  # the profiler reads images that rows name
            blocks.append(profiler.block(read_requests(source, [span]), span.rows))
        tick(span.rows)
    return InputProfile(total, tuple(blocks))


class _Profiler:
    """Measures the prompts of requests, one block after the other."""

    def __init__(self, recipe: Recipe, model: ModelMetadata) -> None:
        self._model = model
        self._limits = recipe.input.image_limits()
        self._chat = ChatPrompt(model.family.processor, model.family.markers)
        self._constant = recipe.input.prompt.constant
        self._compression = CompressionPolicy.from_config(recipe.compression)
        self._counted: dict[int, tuple[int, list[int]]] = {}

    def block(self, requests: Iterator[Request], rows: int) -> SampleBlock:
        prompts: Counter[PromptShape] = Counter()
        refused: Counter[Status] = Counter()
        seen: dict[str, Geometry] = {}
        for request in requests:
            try:
                prompts[self._shape(request, seen)] += 1
            except BadRow as error:
                refused[error.status] += 1
        return SampleBlock(rows, prompts, refused)

    def _shape(self, request: Request, seen: dict[str, Geometry]) -> PromptShape:
        if request.fault is not None:
            raise request.fault
        alone, policy = len(request.images) == 1, self._compression
        read = [read_bytes(ref, self._limits) for ref in request.images]
        keys = image_keys(
            read,
            request.prompts[0] if policy.compressor.reads_prompt else None,
            cuts_several_differently=self._model.family.cropping.cuts_several_differently,
            shares_budget=policy.shares_budget,
        )
        new: dict[str, Geometry] = {}
        shown = [
            self._shown(data, key, seen, new, alone=alone)
            for data, key in zip(read, keys, strict=True)
        ]
        seen |= new  # not before: no image of a row with a bad one is encoded
        while len(seen) > REMEMBERED:
            del seen[next(iter(seen))]
        text_tokens, leading = self._text_tokens(request.prompts[0], len(shown))
        images = tuple(
            ShownImage(geometry, before, is_new)
            for (geometry, is_new), before in zip(shown, leading, strict=True)
        )
        return PromptShape(images, text_tokens)

    def _shown(
        self,
        data: bytes,
        key: str,
        seen: Mapping[str, Geometry],
        new: dict[str, Geometry],
        *,
        alone: bool,
    ) -> tuple[Geometry, bool]:
        """An image's geometry, and whether it was not seen before; then it is noted in `new`."""
        if key in seen or key in new:
            return seen.get(key) or new[key], False
        size = upright_size(data, self._limits)
        new[key] = self._model.family.geometry(size, alone=alone)
        return new[key], True

    def _text_tokens(self, prompt: str, images: int) -> tuple[int, list[int]]:
        """Text tokens, and those before each image; a constant prompt is counted once."""
        if self._constant is not None and images in self._counted:
            return self._counted[images]
        ids, placeholder = self._chat.encode(prompt, images), self._model.family.image_token_id
        places = [place for place, token in enumerate(ids) if token == placeholder]
        counted = len(ids) - images, [place - before for before, place in enumerate(places)]
        self._counted[images] = counted
        return counted


def sample_spans(files: Sequence[SourceFile], rows: int) -> list[Span]:
    """All rows, or about so many: blocks of one length, each at random in its equal part."""
    starts = np.cumsum([0, *(file.rows for file in files)])
    total = int(starts[-1])
    if rows >= total:
        return [Span(file.source, file.fingerprint, 0, file.rows) for file in files if file.rows]
    count = min(SAMPLE_BLOCKS, rows)
    length = max(1, rows // count)
    random = np.random.default_rng(0)
    spans = []
    for part in range(count):
        first, stop = part * total // count, (part + 1) * total // count
        at = int(random.integers(first, max(first + 1, stop - length + 1)))
        index = int(np.searchsorted(starts, at, side="right")) - 1
        file, begin = files[index], at - int(starts[index])
        spans.append(Span(file.source, file.fingerprint, begin, min(begin + length, file.rows)))
    return spans

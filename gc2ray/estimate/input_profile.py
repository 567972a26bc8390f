"""`InputProfile`: how large rows will be for a model, by footers, image headers and prompts.

No pixel is decoded and no weight is loaded. Image headers inside Parquet lie in the image column,
which therefore is read where they are looked at: a sample of the rows, spread over the input in
stretches, or all of them. Images that rows name by a path are fetched whole.

What all rows show is exact. What a sample shows has an interval: a bootstrap over its stretches,
because rows that lie together are alike.

Not covered: images that are damaged behind their header; that rows far apart show the same image.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gc2ray.compression.canvas import Canvas
from gc2ray.core.config.recipe import Recipe
from gc2ray.core.errors import BadRow, ConfigError, ShardError, Status
from gc2ray.core.intervals import Interval, ratio
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span
from gc2ray.data.dataset import Source
from gc2ray.data.image_bytes import read_bytes
from gc2ray.data.image_decoding import upright_size
from gc2ray.models.base import ModelMetadata
from gc2ray.models.chat_template import ChatPrompt

SAMPLE_BLOCKS = 64
"""At most: each opens a file, and reads a row group up to where it lies."""
HOST_BYTES = 128 << 20
REMEMBERED = 4096
"""Images, of which later rows of a stretch may be about; an engine remembers no more, either."""


@dataclass(frozen=True)
class PromptShape:
    """What a prompt shows the model.

    Attributes:
        canvas: Where its image lies among its tokens.
        text_tokens: The rest of the prompt.
        leading_tokens: Those of them before the image.
        is_new: No prompt of the stretch before it shows the same image.
    """

    canvas: Canvas
    text_tokens: int
    leading_tokens: int
    is_new: bool


@dataclass(frozen=True, eq=False)
class SampleBlock:
    """Rows that lie together.

    Attributes:
        rows: How many.
        prompts: What their prompts show.
        refused: Prompts that cannot be answered, by the status that they will have.
    """

    rows: int
    prompts: Counter[PromptShape]
    refused: Counter[Status]


@dataclass(frozen=True, eq=False)
class InputProfile:
    """What was looked at of an input.

    Attributes:
        rows: Of the input.
        stretches: What was looked at.
    """

    rows: int
    stretches: tuple[SampleBlock, ...]

    @cached_property
    def looked(self) -> int:
        """Rows that were looked at."""
        return sum(stretch.rows for stretch in self.stretches)

    @property
    def is_exact(self) -> bool:
        """Whether these are all rows."""
        return self.looked == self.rows

    @cached_property
    def prompts(self) -> Counter[PromptShape]:
        """What the prompts of the rows show that were looked at."""
        return sum((stretch.prompts for stretch in self.stretches), Counter())

    @cached_property
    def refused(self) -> Counter[Status]:
        """Their prompts that cannot be answered."""
        return sum((stretch.refused for stretch in self.stretches), Counter())

    def total(self, measure: Callable[[SampleBlock], float]) -> Interval:
        """A sum over all rows, by what it is in a stretch; see `scaled`."""
        return self.scaled(np.array([measure(stretch) for stretch in self.stretches]))

    def scaled(self, values: np.ndarray) -> Interval:
        """A sum over all rows: exact where all were looked at, else with 95 % confidence.

        A ratio to rows, times all rows; its spread is less where much of the input was looked at
        (finite population).

        Args:
            values: What it is in each stretch, (S,).
        """
        values = values.astype(np.float64)
        if self.is_exact:
            return Interval.exactly(float(values.sum()))
        rows = np.array([stretch.rows for stretch in self.stretches], dtype=np.float64)
        found, seen = ratio(values, rows), float(values.sum())
        unseen = np.sqrt(1 - self.looked / self.rows)
        low = found.mean - unseen * (found.mean - found.low)
        high = found.mean + unseen * (found.high - found.mean)
        return Interval(max(seen, self.rows * low), self.rows * found.mean, self.rows * high)


def profile_input(
    recipe: Recipe,
    outline: ModelMetadata,
    rows: int | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> InputProfile:
    """Look at rows of a recipe's input.

    Args:
        recipe: Whose.
        outline: Of its model.
        rows: How many, about; None for all.
        tick: Called with the rows that were looked at, as they are.

    Raises:
        ConfigError: The input cannot be read.
    """
    source = Source(recipe.input)
    files, _ = source.scan()
    looker = _Profiler(recipe, outline)
    total = sum(file.rows for file in files)
    spans = spread(files, total if rows is None else rows)
    stretches = []
    for span in spans:
        try:
            stretches.append(looker.look(source.read(span, HOST_BYTES), span.rows))
        except ShardError as error:
            raise ConfigError(f"recipe.input: {error}") from error
        tick(span.rows)
    return InputProfile(total, tuple(stretches))


class _Profiler:
    """Looks at requests, one stretch after the other."""

    def __init__(self, recipe: Recipe, outline: ModelMetadata) -> None:
        self._outline = outline
        self._policy = recipe.input.image_policy()
        self._chat = ChatPrompt(outline.processor)
        self._constant = recipe.input.prompt.constant
        self._counted: tuple[int, int] | None = None

    def look(self, requests: Iterator[Request], rows: int) -> SampleBlock:
        prompts: Counter[PromptShape] = Counter()
        refused: Counter[Status] = Counter()
        seen: dict[bytes, Canvas] = {}
        for request in requests:
            try:
                prompts[self._shown(request, seen)] += 1
            except BadRow as error:
                refused[error.status] += 1
        return SampleBlock(rows, prompts, refused)

    def _shown(self, request: Request, seen: dict[bytes, Canvas]) -> PromptShape:
        if request.fault is not None:
            raise request.fault
        data = read_bytes(request.images[0], self._policy)
        key = hashlib.blake2b(data, digest_size=16).digest()
        is_new = key not in seen
        if is_new:
            seen[key] = self._outline.canvas(upright_size(data, self._policy))
            if len(seen) > REMEMBERED:
                del seen[next(iter(seen))]
        return PromptShape(seen[key], *self._text_tokens(request.prompts[0]), is_new)

    def _text_tokens(self, prompt: str) -> tuple[int, int]:
        """Without the image's placeholder, and those before it; of a constant counted once."""
        if self._counted is None or self._constant is None:
            ids = self._chat.encode(prompt)
            self._counted = len(ids) - 1, ids.index(self._outline.image_token_id)
        return self._counted


def spread(files: Sequence[SourceFile], rows: int) -> list[Span]:
    """All rows, or about so many: stretches of one length, each at random in its equal part."""
    starts = np.cumsum([0, *(file.rows for file in files)])
    total = int(starts[-1])
    if rows >= total:
        return [Span(file.source, file.fingerprint, 0, file.rows) for file in files if file.rows]
    count = min(SAMPLE_BLOCKS, rows)
    length = max(1, rows // count)
    draw = np.random.default_rng(0)
    spans = []
    for part in range(count):
        first, stop = part * total // count, (part + 1) * total // count
        at = int(draw.integers(first, max(first + 1, stop - length + 1)))
        file = int(np.searchsorted(starts, at, side="right")) - 1
        found, begin = files[file], at - int(starts[file])
        end = min(begin + length, found.rows)
        spans.append(Span(found.source, found.fingerprint, begin, end))
    return spans

"""Rows of an input that a command reads by itself, and what it says where they cannot be read.

A job tries a shard again that could not be read. A command that reads a few rows reports it to its
user instead, as an error in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from gc2ray.core.config.input import InputConfig
from gc2ray.core.errors import ConfigError, ShardError
from gc2ray.core.records import Request
from gc2ray.core.shards import SourceFile, Span
from gc2ray.data.source import Source

HOST_BYTES = 128 << 20
"""Approximate limit of undecoded input in memory."""


def sample_requests(
    config: InputConfig, rows: int, choose: Callable[[Sequence[SourceFile], int], Iterable[Span]]
) -> tuple[list[Request], int]:
    """The requests of some rows of an input, and the number of rows of the whole input.

    Args:
        config: The input.
        rows: How many rows are wanted, about.
        choose: Returns the spans of so many rows of the files.

    Raises:
        ConfigError: The input cannot be read.
    """
    source = Source(config)
    files, _ = source.scan()
    requests = list(read_requests(source, choose(files, rows)))
    return requests, sum(file.rows for file in files)


def read_requests(source: Source, spans: Iterable[Span]) -> Iterator[Request]:
    """The requests of some spans, in order.

    Raises:
        ConfigError: A span cannot be read.
    """
    with refusing_unreadable_input():
        for span in spans:
            yield from source.read(span, HOST_BYTES)


@contextmanager
def refusing_unreadable_input() -> Iterator[None]:
    """Turn the error of a shard that cannot be read into one of the configuration.

    Raises:
        ConfigError: Rows, or an image that a row names, cannot be read.
    """
    try:
        yield
    except ShardError as error:
        reason = " ".join(str(error).split())  # pyarrow's are of several lines
        raise ConfigError(f"recipe.input: {reason}") from error

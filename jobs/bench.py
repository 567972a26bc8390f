"""Benchmarks of the parts, of the job around a model, and of answering from end to end.

    python -m jobs.bench [--only NAME ...] [--threads N]
    python -m jobs.bench --model llava-next-7b --random-weights

Prints a table, then as the last line of stdout one JSON document with every figure. Goals are
printed beside the figures and nothing fails on them; what is compared is checked to give the same
result. All of it takes well over an hour, most of it `language`, `end_to_end` and `tuning`; stderr
says how long each took. One torch thread, or what `--threads` says, for all that are compared; they
run in turn, and figures are medians of times and of the ratios within a turn. The photographs come
with scikit-image and scikit-learn; models are random, but for that of `tuning`: their answers mean
nothing, their times depend on shapes only.

Not covered: GPUs but by `--model`, and a real model's language side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from gc2ray.core.errors import ConfigError
from jobs.benchmarks import (
    Line,
    attention,
    borders,
    compression,
    end_to_end,
    full_size,
    job_noop,
    language,
    memory,
    planning,
    preprocess,
    questions,
    reporting,
    scores,
    tuning,
)
from jobs.support.machine import cpu_name

BENCHMARKS: dict[str, Callable[[], list[Line]]] = {
    "compression": compression.run,
    "scores": scores.run,
    "attention": attention.run,
    "preprocess": preprocess.run,
    "job_noop": job_noop.run,
    "planning": planning.run,
    "borders": borders.run,
    "memory": memory.run,
    "language": language.run,
    "end_to_end": end_to_end.run,
    "questions": questions.run,
    "tuning": tuning.run,
    "reporting": reporting.run,
}
TORCH_THREADS = 1
PACKAGES = ("gc2ray", "torch", "transformers", "ray", "pillow", "pyarrow")
TABLE_WIDTH = 150
CAPTION = "CPU time of all threads, which others disturb little; job_noop, wall: the clock"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks, or those that are named."""
    parser = argparse.ArgumentParser(description="Benchmarks of gc2ray; goals are not asserted.")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=TORCH_THREADS, help="torch threads")
    parser.add_argument(
        "--model", choices=list(full_size.SIZES), help="instead: a model of full size, see there"
    )
    parser.add_argument("--random-weights", action="store_true", help="what --model needs")
    parser.add_argument("--rows", type=int, help="images for --model")
    chosen = parser.parse_args(arguments)
    if chosen.model and not chosen.random_weights:
        parser.error("--model makes random weights only: add --random-weights")
    if chosen.threads < 1:
        parser.error(f"--threads must be at least 1, got {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    works = BENCHMARKS
    if chosen.model:
        works = {chosen.model: partial(full_size.run, chosen.model, chosen.rows)}
    results: dict[str, list[Line]] = {}
    for name in chosen.only or list(works):
        print(f"{name} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            results[name] = works[name]()
        except ConfigError as error:
            parser.error(str(error))
        took = time.perf_counter() - started
        print(f"{name}: {took:.0f} s", file=sys.stderr, flush=True)
    document: dict[str, Any] = {
        **{name: [asdict(line) for line in lines] for name, lines in results.items()},
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    _print_table(results, document["hardware"])
    print(json.dumps(document))


def _hardware() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _print_table(results: Mapping[str, list[Line]], hardware: Mapping[str, Any]) -> None:
    title = "{cpu}, {cores} cores, torch threads: {torch_threads}".format(**hardware)
    table = Table(title=title, caption=CAPTION)
    for column in ("benchmark", "what", "value", "goal"):
        table.add_column(column, overflow="fold")
    for name, lines in results.items():
        for index, line in enumerate(lines):
            value = ", ".join(f"{key} {_short(number)}" for key, number in line.figures.items())
            table.add_row("" if index else name, line.what, value, line.goal)
        table.add_section()
    console = Console()
    Console(width=max(console.width, TABLE_WIDTH)).print(table)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    main()

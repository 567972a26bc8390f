"""The whole job on this machine, with what the package brings: `gc2ray demo`.

Writes a Parquet of scenes with questions whose answers are known (and one deliberately broken
image), runs `demo.yaml` on it with the demo model and two workers, compressed and then
uncompressed, and shows what came out: accuracy next to tokens, and a sample of the answers.

Backgrounds of the scenes are photographs where the packages of the extra `gc2ray[demo]` are
installed, and generated textures where not.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

import gc2ray
from gc2ray.api import command_line
from gc2ray.core.config.job import Job
from gc2ray.core.errors import ConfigError, Status
from gc2ray.core.intervals import MeanInterval, interval
from gc2ray.core.metrics.scores import score
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import DemoRow, Split, demo_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.output.compact import read_answers
from gc2ray.output.planner import Outcome
from gc2ray.reporting.evaluation import agreement
from gc2ray.runner.ray_session import connected

CONFIG = Path(__file__).with_name("demo.yaml")
JOB_NAME = "job.yaml"
MARKER = ".made-by-gc2ray-demo"
ROWS = 140
SHOWN = 14


def demo(root: Path) -> int:
    """Run the demo; returns the exit code of its first run that did not end well, or 0.

    Args:
        root: Directory for the model, the rows, the job and its outputs. It is made; an earlier
            demo's is emptied first.

    Raises:
        ConfigError: The directory holds something else, or this package has no demo model.
    """
    console = Console()
    started = time.monotonic()
    compressed = demo_job(root)
    uncompressed = demo_job(
        root, ["recipe.compression={method: none}", f"output={root / 'uncompressed'}"]
    )
    _clear(root)
    _write_inputs(console, root, compressed)
    answers = {}
    with connected(None):  # one Ray for both
        for job in (compressed, uncompressed):
            outcome = _run(job)
            if outcome.exit_code:
                return outcome.exit_code
            answers[job.output] = read_answers(job.output).to_pylist()
    _show_answers(console, answers[compressed.output])
    _show_accuracy(console, answers[compressed.output], answers[uncompressed.output])
    console.print(
        f"demo took {time.monotonic() - started:.0f} s; look around in {root}/",
        markup=False,
        soft_wrap=True,
    )
    return 0


def demo_job(root: Path, overrides: Sequence[str] = ()) -> Job:
    """The demo's job, with everything that it reads and writes in one directory."""
    places = [
        f"output={root / 'run'}",
        f"recipe.model.path={root / 'model'}",
        f"recipe.input.uri={root / 'questions.parquet'}",
    ]
    return gc2ray.load_job(CONFIG, *places, *overrides)


def _write_inputs(console: Console, root: Path, job: Job) -> None:
    """The model, the rows and the job, which other commands can be tried on."""
    backgrounds, of = _backgrounds()
    shutil.copytree(MODEL, job.recipe.model.path)
    (path,) = job.recipe.input.uris()
    rows = write_rows(Path(path), iter(_rows(backgrounds)))
    (root / JOB_NAME).write_text(job.located().to_yaml(), encoding="utf-8")
    for line in (
        of,
        f"wrote {rows} questions about as many images to {path}",
        f"wrote the demo model to {job.recipe.model.path}",
        f"wrote the job to {root / JOB_NAME}",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _backgrounds() -> tuple[list[Image.Image], str]:
    """Photographs, none where they are not installed; and a line that says which."""
    try:
        photographs = opened_photos()
    except ImportError:
        return [], (
            "backgrounds are generated textures; for photographs: pip install 'gc2ray[demo]'"
        )
    return photographs, f"backgrounds are cut from {len(photographs)} photographs"


def _run(job: Job) -> Outcome:
    terminal = command_line.terminal()
    with terminal.display() as display:
        outcome = gc2ray.run(job, display=display)
    terminal.outcome(outcome, job.output)
    return outcome


def _clear(root: Path) -> None:
    """Make the directory, and empty that of an earlier demo.

    Raises:
        ConfigError: It holds something else, or cannot be made; or there is no model to copy.
    """
    if not (MODEL / "config.json").is_file():
        raise ConfigError(
            f"this copy of gc2ray has no demo model ({MODEL}): `gc2ray submit` leaves it out; "
            "install gc2ray from its wheel"
        )
    try:
        if root.exists() and any(root.iterdir()):
            if not (root / MARKER).exists():
                raise ConfigError(
                    f"--output: {root} exists and is not an earlier demo's; move it away, or name "
                    "another directory"
                )
            shutil.rmtree(root)
        root.mkdir(parents=True, exist_ok=True)
        (root / MARKER).touch()
    except OSError as error:
        raise ConfigError(f"--output: {root} cannot be made: {error.strerror}") from error


def _rows(backgrounds: Sequence[Image.Image]) -> list[DemoRow]:
    """Held-out scenes, and in the middle one whose image was cut off."""
    rows = list(demo_rows(Split.TEST, ROWS, backgrounds))
    cut = rows[ROWS // 2]
    broken = replace(cut, id="broken", image=cut.image[: len(cut.image) // 2])
    return [*rows[: ROWS // 2], broken, *rows[ROWS // 2 :]]


def _show_answers(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    good = [row for row in rows if row["status"] == Status.OK]
    table = Table("question", "answer", "right answer", "", "visual tokens")
    table.title = f"{SHOWN} of {len(rows)} rows"
    for row in good[: SHOWN // 2] + good[-SHOWN // 2 :]:
        right = score("exact_match", [row["answer"]], [[row["reference"]]])[0] == 1
        mark = "[green]right[/]" if right else "[red]wrong[/]"
        tokens = f"{row['visual_tokens_full']} -> {row['visual_tokens_kept']}"
        table.add_row(row["question"], ascii(row["answer"])[1:-1], row["reference"], mark, tokens)
    console.print(table)
    for row in (row for row in rows if row["status"] != Status.OK):
        line = f"{row['id']} ({row['row_key']}): {row['status']}: {row['error']}"
        console.print(line, markup=False, soft_wrap=True)


def _show_accuracy(
    console: Console, compressed: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]]
) -> None:
    table = Table("", "exact match [95% interval]", "visual tokens a row, newlines included")
    for name, rows in (("compressed", compressed), ("uncompressed", full)):
        accuracy, tokens = _accuracy(rows)
        table.add_row(name, str(accuracy), f"{tokens:.0f}")
    console.print(table)
    both = agreement(
        *({row["row_key"]: row["answer"] for row in rows} for rows in (compressed, full))
    )
    console.print(f"same answer compressed and uncompressed: {both.same}", markup=False)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> tuple[MeanInterval, float]:
    """Over the rows that were answered: the broken image says nothing about the model."""
    good = [row for row in rows if row["status"] == Status.OK]
    right = score("exact_match", [r["answer"] for r in good], [[r["reference"]] for r in good])
    tokens = [row["visual_tokens_kept"] + row["newline_tokens"] for row in good]
    return interval(right), sum(tokens) / len(tokens)

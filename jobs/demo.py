"""The whole job on this machine: `make demo`.

Writes a Parquet of scenes with questions whose answers are known (and one deliberately broken
picture), runs `configs/demo.yaml` on it with the pocket model and two workers, compressed and then
uncompressed, and shows what came out: accuracy next to tokens, and a sample of the answers.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from gc2ray.core.config.job import Job, load_job
from gc2ray.core.errors import Status
from gc2ray.core.intervals import MeanInterval, interval
from gc2ray.core.metrics.scores import score
from gc2ray.demo.rows import PocketRow, Split, pocket_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.output.planner import Outcome
from gc2ray.report.evaluation import agreement
from gc2ray.report.terminal import print_outcome, run_display
from gc2ray.runner.ray_session import connected
from gc2ray.runner.run import run_job
from jobs.support.photos import opened_photos

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
MARKER = ".made-by-gc2ray-demo"
ROWS = 140
SHOWN = 14
UNCOMPRESSED = ("recipe.compression={method: none}", "output=demo-output/uncompressed")


def main() -> int:
    """Run the demo; the exit code is the first run's that did not end well."""
    console = Console()
    started = time.monotonic()
    compressed, uncompressed = load_job(CONFIG), load_job(CONFIG, UNCOMPRESSED)
    root = Path(compressed.output).parent
    _clear(root)
    shutil.copytree(MODEL, compressed.recipe.model.path)
    (path,) = compressed.recipe.input.uris()
    rows = write_rows(Path(path), iter(_rows()))
    console.print(f"wrote {rows} questions about as many pictures to {path}")
    console.print(f"wrote the pocket model to {compressed.recipe.model.path}")
    answers = {}
    with connected(None):  # one Ray for both
        for job in (compressed, uncompressed):
            outcome = _run(console, job)
            if outcome.exit_code:
                return outcome.exit_code
            answers[job.output] = pq.read_table(Path(job.output) / "data").to_pylist()
    _show_answers(console, answers[compressed.output])
    _show_accuracy(console, answers[compressed.output], answers[uncompressed.output])
    console.print(f"demo took {time.monotonic() - started:.0f} s; look around in {root}/")
    return 0


def _run(console: Console, job: Job) -> Outcome:
    with run_display(console) as display:
        outcome = run_job(job, display=display)
    print_outcome(console, outcome, job.output)
    return outcome


def _clear(root: Path) -> None:
    """Start afresh, but only where an earlier demo was."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise SystemExit(f"{root} exists and is not an earlier demo's; move it away")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()


def _rows() -> list[PocketRow]:
    """Held-out scenes, and in the middle one whose picture was cut off."""
    rows = list(pocket_rows(Split.TEST, ROWS, opened_photos()))
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
    """Over the rows that were answered: the broken picture says nothing about the model."""
    good = [row for row in rows if row["status"] == Status.OK]
    right = score("exact_match", [r["answer"] for r in good], [[r["reference"]] for r in good])
    tokens = [row["visual_tokens_kept"] + row["newline_tokens"] for row in good]
    return interval(right), sum(tokens) / len(tokens)


if __name__ == "__main__":
    sys.exit(main())

"""Commands as a user types them, in a process or without one, and a job for them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from gc2ray.cli.app import app
from tests.support.rows import job_data, write_rows

ROOT = Path(__file__).parents[2]
OURS = logging.getLogger("gc2ray")


def start(*words: object) -> subprocess.Popen[str]:
    """A command in a process of its own, while it runs."""
    return subprocess.Popen(
        [sys.executable, "-m", "gc2ray", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )


def gc2ray(*words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, after it has ended."""
    process = start(*words)
    stdout, stderr = process.communicate(timeout=400)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_command(*words: object) -> Result:
    """A command without a process of its own, which is seconds faster; not for those that run Ray.

    What a process sets up for itself, handlers of logs, is put back.
    """
    root = logging.getLogger()
    handlers, levels = root.handlers[:], [(name, name.level) for name in (root, OURS)]
    try:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in words])
    finally:
        root.handlers[:] = handlers
        for logger, level in levels:
            logger.setLevel(level)


def job_file(tmp_path: Path, model: Path, rows: int = 12, **cluster: object) -> Path:
    """A job of one worker, with the rows that it answers."""
    source = write_rows(tmp_path / "in" / "a.parquet", rows, row_group=6)
    data = job_data(model, source, tmp_path / "out")
    data["cluster"] |= {"workers": 1, "shard_rows": 6, **cluster}
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return path

"""The whole job on real photographs, on this machine: `make demo`.

Writes a Parquet of sample photographs (and one deliberately broken file), builds a tiny LLaVA-NeXT
with the real geometry, runs `configs/demo.yaml` on it with two workers, and shows what came out.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from gc2ray.config import load_job
from gc2ray.display import RunDisplay, print_outcome
from gc2ray.driver import run_job
from gc2ray.families.tiny import TinySpec, build_tiny
from jobs.photos import Photo, jpeg, sample_photos

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
MARKER = ".made-by-gc2ray-demo"
PROMPTS = ("Describe the image in one sentence.", "Which colour is it?")
SHOWN = 6

REAL_GEOMETRY = TinySpec(image_size=336, patch_size=14, vision=(64, 4, 4), text=(128, 3, 4, 4))
"""336-pixel views of 24 x 24 patches and the five pinpoints, as in LLaVA-NeXT-7B; tiny widths."""


def main() -> int:
    """Run the demo; the exit code is the run's."""
    console = Console()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    job = load_job(CONFIG)
    root = Path(job.output).parent
    _clear(root)
    photos = _with_panoramas(sample_photos())
    rows = _write_rows(Path(job.recipe.input.uri), photos)
    console.print(f"wrote {rows} rows over {len(photos)} photographs to {job.recipe.input.uri}")
    build_tiny(Path(job.recipe.model.path), REAL_GEOMETRY)
    console.print(f"wrote a tiny LLaVA-NeXT (336/14, five pinpoints) to {job.recipe.model.path}")
    with RunDisplay(console) as display:
        outcome = run_job(job, display=display)
    print_outcome(console, outcome, job.output)
    _show_answers(console, Path(job.output))
    console.print(
        "[bold yellow]The model's weights are random, so its answers mean nothing.[/] Tokens, "
        "memory and errors are real.",
        soft_wrap=True,
    )
    console.print(f"demo took {time.monotonic() - started:.0f} s; look around in {root}/")
    return outcome.exit_code


def _clear(root: Path) -> None:
    """Start afresh, but only where an earlier demo was."""
    if root.exists() and any(root.iterdir()):
        if not (root / MARKER).exists():
            raise SystemExit(f"{root} exists and is not an earlier demo's; move it away")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()


def _with_panoramas(photos: list[Photo]) -> list[Photo]:
    """Two strips cut from a photograph, so that the 1 x 3 and 3 x 1 grids occur too."""
    hubble = next(photo for photo in photos if photo.name.startswith("hubble"))
    with Image.open(io.BytesIO(hubble.data)) as image:
        width, height = image.size
        strips = {
            "hubble-wide.jpg": image.crop((0, height // 3, width, height // 3 + width // 3)),
            "hubble-tall.jpg": image.crop((width // 3, 0, width // 3 + height // 3, height)),
        }
        return [
            *photos,
            *(Photo(name, jpeg(strip.convert("RGB"), 92)) for name, strip in strips.items()),
        ]


def _write_rows(path: Path, photos: list[Photo]) -> int:
    """Every photograph with every prompt, and a photograph that was cut off in the middle."""
    broken = Photo("broken.jpg", photos[-1].data[: len(photos[-1].data) // 2])
    pairs = [(photo, prompt) for photo in photos for prompt in PROMPTS]
    pairs.insert(len(pairs) // 2, (broken, PROMPTS[0]))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "photo": [photo.name for photo, _ in pairs],
            "image": pa.array([{"bytes": p.data, "path": None} for p, _ in pairs], image),
            "prompt": [prompt for _, prompt in pairs],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=8)
    return len(pairs)


def _show_answers(console: Console, output: Path) -> None:
    rows = pq.read_table(output / "data").to_pylist()
    table = Table("photo", "tokens", "kept", "answer", title=f"{SHOWN} of {len(rows)} answer rows")
    for row in [row for row in rows if row["status"] == "ok"][:: max(1, len(rows) // SHOWN)]:
        full, kept = row["visual_tokens_full"], row["visual_tokens_kept"]
        table.add_row(row["photo"], str(full), str(kept), ascii(row["answer"])[:40])
    console.print(table)
    for row in (row for row in rows if row["status"] != "ok"):
        line = f"{row['photo']} ({row['row_key']}): {row['status']}: {row['error']}"
        console.print(line, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

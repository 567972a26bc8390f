"""Whether `gc2ray tune` recommends what is right: samples of the demo model's rows against many.

Each sample is tuned as a user would have it, for a target accuracy. What is true is measured on
fresh rows that are in no sample, with every setting. A recommendation is right where its accuracy
on the fresh rows meets the target; what it costs is compared with the cheapest setting that does.

Not covered: other targets than accuracy; models whose answers are long.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL.Image import Image

from gc2ray.core.config.job import Job, parse_job
from gc2ray.demo.photos import opened_photos
from gc2ray.demo.rows import Split, demo_rows, write_rows
from gc2ray.demo.spec import MODEL
from gc2ray.estimation.hardware import Prices
from gc2ray.estimation.recommendation import Measured, Target, Tuning
from gc2ray.estimation.trials import BASELINE, CompressionSetting
from gc2ray.estimation.tune import TuneRequest, tune_run
from jobs.benchmarks import Line, goal

SAMPLES, SAMPLE_ROWS, FRESH_ROWS = 10, 400, 2000
TARGET = 0.9
RIGHT, DEAREST = 0.9, 1.25
"""Goals: recommendations that must be right, and what one may cost of the cheapest."""


def run(samples: int = SAMPLES, rows: int = SAMPLE_ROWS, fresh: int = FRESH_ROWS) -> list[Line]:
    """One line of what is true of each setting, one of each sample's recommendation, and all.

    Args:
        samples: Disjoint ones.
        rows: Of each.
        fresh: Rows that tell what is true.
    """
    with tempfile.TemporaryDirectory() as folder:
        tuning = partial(_tuning, Path(folder), opened_photos())
        truth = {item.setting: item for item in tuning(samples * rows, fresh).measured}
        found = [tuning(sample * rows, rows) for sample in range(samples)]
    return [*_truth(truth), *verdicts(found, truth)]


def _tuning(folder: Path, photographs: Sequence[Image], first: int, rows: int) -> Tuning:
    """A tuning on rows of the test split from a first one on."""
    path = folder / f"{first}.parquet"
    write_rows(path, demo_rows(Split.TEST, rows, photographs, first))
    request = TuneRequest(rows, (), (), Target(min_accuracy=TARGET), "reference", Prices(()))
    return tune_run(_job(path), request)


def _job(rows: Path) -> Job:
    return parse_job(
        {
            "output": str(rows.with_suffix("")),
            "recipe": {
                "model": {"path": str(MODEL), "dtype": "float32"},
                "generation": {"max_new_tokens": 32},
                "input": {
                    "uri": str(rows),
                    "prompt": {"column": "question"},
                    "keep": ["reference"],
                },
            },
            "cluster": {"image_threads": 1},
        }
    )


def _meets(item: Measured) -> bool:
    return item.quality.mean >= TARGET


def _truth(truth: Mapping[CompressionSetting, Measured]) -> list[Line]:
    return [
        Line(
            f"{setting.name}, fresh rows",
            {
                "accuracy": item.quality.mean,
                "ms_a_row": 1e3 * item.seconds_per_row,
                "speed_up": item.speed_up.mean,
            },
        )
        for setting, item in truth.items()
    ]


def verdicts(found: Sequence[Tuning], truth: Mapping[CompressionSetting, Measured]) -> list[Line]:
    """A line for each sample, and one for all; no recommendation is wrong, and costs like none."""
    cheapest = min((item.seconds_per_row for item in truth.values() if _meets(item)), default=0.0)
    lines, right, dearest = [], 0, 0.0
    for sample, tuning in enumerate(found):
        item = truth[tuning.recommended or BASELINE]
        cost = item.seconds_per_row / cheapest if cheapest else 0.0
        right += tuning.recommended is not None and _meets(item)
        dearest = max(dearest, cost)
        name = tuning.recommended.name if tuning.recommended else "nothing"
        lines.append(Line(f"sample {sample} recommends {name}", {"cost_of_cheapest": cost}))
    met = right >= RIGHT * len(found) and dearest <= DEAREST
    text = f"{RIGHT:.0%} right, at most {DEAREST}x the cheapest"
    figures = {"right": float(right), "of": float(len(found)), "dearest": dearest}
    return [*lines, Line("all samples", figures, goal(text, met=met))]

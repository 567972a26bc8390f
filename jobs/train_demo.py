"""Train one of the demo's models: `python -m jobs.train_demo DIRECTORY [--family smolvlm]`.

Four stages: the tower alone, on what is in patches and views; the projector, towards the words that
name what patches show; projector and language model, on questions; then everything, the tower at
half the rate and with its own loss kept, and questions about notes in words besides. Every stage
goes on from its last checkpoint, so the command may be stopped and started again. `curve.jsonl` in
the directory has the figures of every 50 steps. At the end the model is written to
`DIRECTORY/model` in half precision, as it ships.

On one GPU: as it is, with `--workers` processes to draw scenes. On CPUs: `--processes` as many as
there are cores, one thread each. `--steps 0.01` runs a hundredth of every stage, to try it out.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from gc2ray.models.processor import Processor
from jobs.training.language import LanguageLearner
from jobs.training.llava_next import LlavaNextPocket
from jobs.training.pocket import Pocket
from jobs.training.smolvlm import SmolVlmPocket
from jobs.training.tower import TowerLearner
from jobs.training.trainer import Learner, Stage, Trainer


@dataclass(frozen=True)
class Course:
    """A stage, and what it teaches besides.

    Attributes:
        stage: Its steps and rates.
        tower_share: The tower's rate as a share of the others', where there are others; 0 freezes
            it.
        reads: Whether questions are asked about notes in words too.
    """

    stage: Stage
    tower_share: float = 0.0
    reads: bool = False


TOWER = Stage("tower", number=0, steps=4600, scenes=20, questions=0, rate=1e-3)
WORDS = Stage("words", number=1, steps=300, scenes=20, questions=0, rate=1e-3, least=0.5)
LANGUAGE = Stage(
    "language", number=2, steps=4000, scenes=12, questions=10, rate=1e-3, least=0.1, horizon=1.375
)
TOGETHER = Stage("together", number=3, steps=1500, scenes=12, questions=10, rate=4e-4)
STAGES = {
    course.stage.name: course
    for course in (
        Course(TOWER),
        Course(WORDS),
        Course(LANGUAGE),
        Course(TOGETHER, tower_share=0.5, reads=True),
    )
}
"""Stages by name, in order."""
POCKETS: dict[str, Callable[[], Pocket]] = {
    "llava_next": LlavaNextPocket,
    "smolvlm": SmolVlmPocket,
}
"""The demo's models by family."""


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    directory: Path
    family: str
    processes: int
    workers: int
    steps: float
    seed: int
    start: Path | None
    stages: tuple[str, ...]
    rendezvous: str

    def stage(self, stage: Stage, pocket: Pocket) -> Stage:
        """The stage, shortened; the tower's batches as large as suits the model."""
        share = pocket.tower_batch if stage.name == TOWER.name else 1.0
        return replace(
            stage,
            steps=max(1, round(stage.steps * self.steps)),
            scenes=max(1, round(stage.scenes * share)),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or continue training."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_demo", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoints, curve and model go here")
    parser.add_argument("--family", choices=list(POCKETS), default="llava_next")
    parser.add_argument("--processes", type=int, default=1, help="that share each batch")
    parser.add_argument("--workers", type=int, default=0, help="per process, that draw scenes")
    parser.add_argument("--steps", type=float, default=1.0, help="share of every stage's steps")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    parser.add_argument("--start", type=Path, help="a demo model to start from, not random weights")
    parser.add_argument(
        "--stages", type=lambda text: tuple(text.split(",")), default=tuple(STAGES),
        help="those to run, with commas between, others as they were left; default: all",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.stages) - set(STAGES):
        parser.error(f"no stage {min(unknown)!r}; there are {', '.join(STAGES)}")
    trainer = Trainer(chosen.directory, POCKETS[chosen.family]().cutter)
    towerless = TOWER.name not in chosen.stages and not trainer.has_run(TOWER)
    if towerless and chosen.start is None:
        parser.error(f"{chosen.directory} has no trained tower; run that stage or give --start")
    chosen.directory.mkdir(parents=True, exist_ok=True)
    rendezvous = (chosen.directory / f"rendezvous-{uuid.uuid4().hex}").absolute()
    settings = Settings(**vars(chosen), rendezvous=str(rendezvous))
    if settings.processes == 1:
        train(0, settings)
        return
    try:
        spawn(train, (settings,), nprocs=settings.processes)  # type: ignore[no-untyped-call]
    finally:
        rendezvous.unlink(missing_ok=True)


def train(rank: int, settings: Settings) -> None:
    """What each process does."""
    _join(rank, settings)
    transformers_logging.disable_progress_bar()
    pocket = POCKETS[settings.family]()
    model, files = pocket.untrained(settings.seed)
    processor = Processor.from_transformers(files)
    if settings.start is not None:
        start = AutoModelForImageTextToText.from_pretrained(settings.start, dtype=torch.float32)
        model.load_state_dict(start.state_dict())
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(settings.directory, pocket.cutter, settings.workers, rank, settings.processes)
    torch.manual_seed(settings.seed)
    tower = TowerLearner(model, pocket)
    last = max(list(STAGES).index(name) for name in settings.stages)
    for name, course in list(STAGES.items())[: last + 1]:
        learner: Learner = tower
        if name != TOWER.name:
            learner = LanguageLearner(
                model, processor, tower, tower_share=course.tower_share, reads=course.reads
            )
        if name in settings.stages:
            _run(trainer, settings.stage(course.stage, pocket), learner)
        elif settings.start is None and trainer.has_run(course.stage):
            trainer.resume(course.stage, learner)
    if rank == 0:
        half, _ = pocket.untrained(settings.seed)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(settings.directory / "model")
        files.save_pretrained(settings.directory / "model")


def _join(rank: int, settings: Settings) -> None:
    """Meet the other processes, if there are any."""
    if settings.processes == 1:
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{settings.rendezvous}",
        rank=rank,
        world_size=settings.processes,
    )


def _run(trainer: Trainer, stage: Stage, learner: Learner) -> None:
    modules: dict[str, nn.Module] = learner.modules()
    for module in modules.values():
        module.train()
    trainer.run(stage, learner)


if __name__ == "__main__":
    main()

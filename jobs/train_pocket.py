"""Train the pocket model: `python -m jobs.train_pocket DIRECTORY`.

Three stages: the tower alone on what is in patches and views; projector and language model on
questions, the tower frozen; everything together, the tower at a tenth of the rate and with its own
loss kept. Every stage goes on from its last checkpoint, so the command may be stopped and started
again. `curve.jsonl` in the directory has the figures of every 50 steps. At the end the model is
written to `DIRECTORY/model` in half precision, as it ships.

On one GPU: as it is, with `--workers` processes to draw scenes. On CPUs: `--processes` as many as
there are cores, one thread each. `--steps 0.01` runs a hundredth of every stage, to try it out.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from transformers.utils import logging as transformers_logging

from gc2ray.families.tiny import untrained
from gc2ray.pocket.model import pocket_spec
from jobs.training.language import LanguageLearner
from jobs.training.tower import TowerLearner
from jobs.training.trainer import Learner, Stage, Trainer

TOWER = Stage("tower", number=0, steps=4600, scenes=20, questions=0, rate=1e-3)
LANGUAGE = Stage("language", number=1, steps=1800, scenes=16, questions=10, rate=1e-3)
TOGETHER = Stage("together", number=2, steps=1700, scenes=16, questions=10, rate=6e-4)
TOWER_SHARE = 0.3
"""Rate of the tower in the last stage, as a share of the others'."""


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    directory: Path
    processes: int
    workers: int
    steps: float
    seed: int
    rendezvous: str

    def stage(self, stage: Stage) -> Stage:
        """The stage, shortened."""
        return replace(stage, steps=max(1, round(stage.steps * self.steps)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on training."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_pocket", description=__doc__)
    parser.add_argument("directory", type=Path, help="checkpoints, curve and model go here")
    parser.add_argument("--processes", type=int, default=1, help="that share each batch")
    parser.add_argument("--workers", type=int, default=0, help="per process, that draw scenes")
    parser.add_argument("--steps", type=float, default=1.0, help="share of every stage's steps")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights")
    chosen = parser.parse_args(arguments)
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
    if settings.processes > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // settings.processes))
        dist.init_process_group(
            "gloo",
            init_method=f"file://{settings.rendezvous}",
            rank=rank,
            world_size=settings.processes,
        )
    transformers_logging.disable_progress_bar()
    model, processor = untrained(replace(pocket_spec(), seed=settings.seed))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    trainer = Trainer(settings.directory, settings.workers, rank, settings.processes)
    torch.manual_seed(settings.seed)
    tower = TowerLearner(model)
    _run(trainer, settings.stage(TOWER), tower)
    for stage, share in ((LANGUAGE, 0.0), (TOGETHER, TOWER_SHARE)):
        _run(trainer, settings.stage(stage), LanguageLearner(model, processor, tower, share))
    if rank == 0:
        export(settings.directory / "model", model, processor)


def _run(trainer: Trainer, stage: Stage, learner: Learner) -> None:
    modules: dict[str, nn.Module] = learner.modules()
    for module in modules.values():
        module.train()
    trainer.run(stage, learner)


def export(directory: Path, model: Any, processor: Any) -> None:
    """Write model and processor as transformers loads them, weights in half precision."""
    half, _ = untrained(pocket_spec())
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(directory)
    processor.save_pretrained(directory)


if __name__ == "__main__":
    main()

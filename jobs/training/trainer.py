"""The loop of a stage: steps, cosine schedule, checkpoints, curve, and going on where it stopped.

A checkpoint holds the stage's modules, the optimizer and the step; batches follow from their
number, so a run that was stopped ends where one that was not would have, up to rounding.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from gc2ray.demo.rows import Split
from jobs.training.lessons import Lesson, Lessons, lesson_loader
from jobs.training.pocket import Cutter

CLIP = 1.0
WARMUP = 0.04
"""Share of the steps in which the rate rises."""
LOG_STEPS, SAVE_STEPS = 50, 200
VALIDATION_BATCHES = 20


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: Also of its checkpoint.
        number: Part of every scene's seed.
        steps: In all.
        scenes: In a batch.
        questions: About a scene, at most.
        rate: The highest learning rate.
        least: The rate at the end, as a share of it.
        horizon: The rate falls as if there were this many times as many steps; above 1 where a
            later stage continues.
    """

    name: str
    number: int
    steps: int
    scenes: int
    questions: int
    rate: float
    least: float = 0.02
    horizon: float = 1.0

    def rate_at(self, step: int) -> float:
        """Share of `rate` at a step: linear rise, then half a cosine."""
        steps = self.steps * self.horizon
        warm = max(1, int(steps * WARMUP))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        return self.least + (1 - self.least) * (1 + math.cos(math.pi * done)) / 2


class Averages:
    """Means of figures over steps; a step may lack some."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Count one step."""
        for name, value in figures.items():
            total, steps = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(value), steps + 1

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {name: total / steps for name, (total, steps) in self._sums.items()}


class Learner(Protocol):
    """What a stage trains, and on what loss."""

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds, by name."""

    def groups(self, rate: float) -> Iterator[dict[str, Any]]:
        """The optimizer's parameter groups."""

    def loss(self, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and figures for the curve."""


@dataclass(frozen=True)
class Trainer:
    """Runs stages in a directory.

    Attributes:
        directory: Where checkpoints and `curve.jsonl` go.
        cutter: Cuts pictures into the model's views.
        workers: Processes that draw scenes ahead; 0 draws them between steps.
        rank: This process, of `processes` that train together on parts of each batch.
        processes: How many; `torch.distributed` is initialised where there are several.
    """

    directory: Path
    cutter: Cutter
    workers: int = 0
    rank: int = 0
    processes: int = 1

    def run(self, stage: Stage, learner: Learner) -> None:
        """Train to the stage's last step, from its checkpoint if there is one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        optimizer = torch.optim.AdamW(learner.groups(stage.rate), weight_decay=0.01, fused=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        first = self.resume(stage, learner, optimizer) if self.has_run(stage) else 0
        if first >= stage.steps:
            return
        lessons = self._lessons(Split.TRAIN, stage)
        averages = Averages()
        started = time.monotonic()
        loader = lesson_loader(lessons, first, stage.steps, self.workers)
        for step, lesson in enumerate(loader, start=first):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * stage.rate_at(step)
            averages.add(self._step(learner, optimizer, lesson))
            done = step + 1
            if done % LOG_STEPS == 0:
                seconds = (time.monotonic() - started) / (done - first)
                self._log(stage, done, {**averages.means(), "seconds_per_step": seconds})
                averages = Averages()
            if done % SAVE_STEPS == 0 or done == stage.steps:
                self._save(stage, learner, optimizer, done)
        self._log(stage, stage.steps, self._validated(stage, learner))

    def has_run(self, stage: Stage) -> bool:
        """Whether the stage has a checkpoint here."""
        return self._checkpoint(stage).exists()

    def resume(
        self, stage: Stage, learner: Learner, optimizer: torch.optim.Optimizer | None = None
    ) -> int:
        """Modules, and the optimizer if given, as the stage's checkpoint has them; its step."""
        state = torch.load(self._checkpoint(stage), map_location="cpu", weights_only=True)
        for name, module in learner.modules().items():
            module.load_state_dict(state[name])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
        self._log(stage, step, {"resumed": 1.0})
        return step

    def _step(
        self, learner: Learner, optimizer: torch.optim.Optimizer, lesson: Lesson
    ) -> dict[str, Tensor]:
        """Learn from one lesson; returns its figures."""
        loss, figures = learner.loss(lesson)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._average(parameters)
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return {"loss": loss.detach(), **figures}

    @torch.no_grad()
    def _validated(self, stage: Stage, learner: Learner) -> dict[str, float]:
        """Figures on the validation split, in the names of the curve with `validation_` before."""
        lessons = self._lessons(Split.VALIDATION, stage)
        averages = Averages()
        for lesson in lesson_loader(lessons, 0, VALIDATION_BATCHES, self.workers):
            loss, figures = learner.loss(lesson)
            averages.add({"loss": loss, **figures})
        return {f"validation_{name}": mean for name, mean in averages.means().items()}

    def _lessons(self, split: Split, stage: Stage) -> Lessons:
        share = self.rank, self.processes
        return Lessons(self.cutter, split, stage.number, stage.scenes, stage.questions, share=share)

    def _average(self, parameters: list[nn.Parameter]) -> None:
        """The mean of all processes' gradients, in each of them."""
        if self.processes == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        parts = (flat / self.processes).split(  # type: ignore[no-untyped-call]
            [grad.numel() for grad in grads]
        )
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))

    def _checkpoint(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.pt"

    def _save(self, stage: Stage, learner: Learner, optimizer: Any, done: int) -> None:
        if self.rank > 0:
            return
        state = {
            "step": done,
            "steps": stage.steps,
            "optimizer": optimizer.state_dict(),
            **{name: module.state_dict() for name, module in learner.modules().items()},
        }
        temporary = self._checkpoint(stage).with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._checkpoint(stage))

    def _log(self, stage: Stage, step: int, figures: dict[str, float]) -> None:
        if self.rank > 0:
            return
        line = {"stage": stage.name, "step": step, "of": stage.steps}
        line |= {name: round(value, 4) for name, value in figures.items()}
        text = json.dumps(line)
        print(text, flush=True)
        with (self.directory / "curve.jsonl").open("a") as file:
            file.write(text + "\n")

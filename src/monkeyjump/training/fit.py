"""A model and its rows through the stock Trainer, with everything that watches a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from monkeyjump import CenterUpdate
from monkeyjump.training.arguments import training_arguments
from monkeyjump.training.building import Rows
from monkeyjump.training.callbacks import (
    Checkpoints,
    EveryAdapterLearns,
    FiniteGradients,
    Metrics,
    RankSchedule,
    Step,
    StopOnSignal,
)
from monkeyjump.training.checkpoints import ASIDE
from monkeyjump.training.config import Centers, Train
from monkeyjump.training.routing_log import RoutingLog
from monkeyjump.training.saving import no_space
from monkeyjump.training.signals import Interrupts
from monkeyjump.training.trainer import RunTrainer
from monkeyjump.tuner.router import Router


@dataclass
class Fitted:
    """`trainer` has the model in whatever wrapping it was trained in."""

    trainer: RunTrainer
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Watch:
    """What else looks at a run. `folder`: of the checkpoints; None: none are written."""

    report: Callable[[Step], None] = lambda step: None
    where: Callable[[int], str] = lambda row: f"row {row}"
    folder: Path | None = None
    resume: Path | None = None
    routing: RoutingLog | None = None
    interrupts: Interrupts | None = None
    callbacks: Sequence[TrainerCallback] = ()


class LogRouting(TrainerCallback):
    """Measures at the start, every so many steps, and at the end."""

    def __init__(self, log: RoutingLog, every: int, resume: Path | None) -> None:
        self.log, self.every, self.resume = log, every, resume
        self.trainer: RunTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resume is not None:
            self.log.restore(self.resume)
        else:
            self._note(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._note(control)

    def _note(self, control: Any) -> None:
        assert self.trainer is not None
        due = control.should_log
        self.trainer.log(self.log.measure())
        control.should_log = due  # Trainer takes the loss's own line for written


def fit(
    model: Any,
    rows: Rows,
    collate: Callable[..., Any],
    train: Train,
    centers: Centers,
    names: list[str],
    work: Path,
    watch: Watch | None = None,
) -> Fitted:
    """Trains `model` in place.

    Args:
        rows: encoded, with row_ids and task_ids; `names` are those of the tasks.
        work: Trainer's own folder.

    Raises:
        FloatingPointError: no finite gradient in `train.stop_after` steps in a row; the message names the rows.
        SaveFailed: the disk is full.
    """
    watch = watch or Watch()
    strategy = {} if watch.folder else {"save_strategy": "no"}
    aside = watch.folder / ASIDE if watch.folder else work
    arguments = training_arguments(train, aside, **strategy)
    _check_ranks(arguments)
    update = center_update(model, centers)
    callbacks: list[TrainerCallback] = [EveryAdapterLearns(), FiniteGradients(train.stop_after, update, watch.where)]
    if update is not None:
        callbacks.append(update)
    elif isinstance(model.base_model, AdaLoraModel):
        callbacks.append(RankSchedule())
    if watch.routing is not None and train.routing_every:
        callbacks.append(LogRouting(watch.routing, train.routing_every, watch.resume))
    callbacks += watch.callbacks
    if watch.interrupts is not None:
        callbacks.append(StopOnSignal(watch.interrupts))
    if watch.folder is not None:
        extra = watch.routing.save if watch.routing is not None else lambda folder: None
        callbacks.append(Checkpoints(watch.folder, train.keep, extra))
    trainer = RunTrainer(model, arguments, train_dataset=rows, data_collator=collate, names=names)
    fitted = Fitted(trainer)

    def note(step: Step) -> None:
        fitted.steps, fitted.seconds, fitted.tokens = step.number, step.seconds, step.tokens
        if "loss" in step.metrics:
            fitted.losses.append(step.loss)
        watch.report(step)

    trainer.remove_callback(PrinterCallback)
    for callback in (Metrics(note), *callbacks):
        if isinstance(callback, (FiniteGradients, LogRouting)):
            callback.trainer = trainer
        trainer.add_callback(callback)
    with no_space(aside):
        trainer.train(resume_from_checkpoint=str(watch.resume) if watch.resume else None)
    return fitted


def _check_ranks(arguments: TrainingArguments) -> None:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and arguments.world_size != torch.distributed.get_world_size():
        raise RuntimeError(
            f"{torch.distributed.get_world_size()} processes were started, but Trainer sees {arguments.world_size}: "
            "each would train alone; check train.arguments and the launch file"
        )


def center_update(model: Any, centers: Centers) -> CenterUpdate | None:
    """For a model with routers; it also runs AdaLoRA's rank schedule."""
    if any(isinstance(module, Router) for module in model.modules()):
        return CenterUpdate(every=centers.every, until=centers.until)
    return None

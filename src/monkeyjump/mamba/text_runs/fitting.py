"""Training of a run: how many steps, complete checkpoints, metrics, signals."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from monkeyjump.mamba.presets import Training
from monkeyjump.mamba.text_runs.trainer import HeldOut, WindowTrainer
from monkeyjump.mamba.text_runs.windows import Windows, collate, windows_in
from monkeyjump.training import folder as files
from monkeyjump.training.callbacks import Checkpoints, FiniteGradients, Metrics, Step, StopOnSignal
from monkeyjump.training.checkpoints import number_of
from monkeyjump.training.run import Display
from monkeyjump.training.saving import no_space
from monkeyjump.training.signals import Interrupts

TRAINING_SHARE = 0.93  # of the minutes: the rest goes to the held-out perplexities
TIMED_STEPS = 6
STOP_AFTER = 3  # steps in a row without a finite gradient


def planned_steps(settings: Training, stream: np.ndarray, model: Any) -> tuple[int, float | None]:
    """Optimizer steps of the run, and the seconds of one where they had to be measured.

    `model` is trained by the measurement: give one that is not needed.
    """
    if settings.max_steps is not None:
        return settings.max_steps, None
    if settings.num_epochs is not None:
        return math.ceil(settings.num_epochs * windows_in(stream, settings.context_length) / settings.batch_size), None
    assert settings.minutes is not None
    windows = Windows(stream, settings.context_length, settings.batch_size, settings.seed)
    batch = collate(windows[number] for number in range(len(windows)))
    del batch["row_ids"]
    seconds = seconds_per_step(model, batch)
    return max(1, int(TRAINING_SHARE * 60 * settings.minutes / seconds)), seconds


def seconds_per_step(model: Any, batch: dict[str, Tensor]) -> float:
    """Median time of an optimizer step on `batch`. `model` is trained by it: give one that is not needed."""
    optimizer = torch.optim.AdamW(model.train().parameters())
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[len(times) // 2 - 1]  # the first step also sets buffers up


def fit(
    trainer: WindowTrainer,
    watched: HeldOut,
    folder: Path,
    keep: int,
    checkpoint: Path | None,
    interrupts: Interrupts,
    display: Display,
    name: str,
    callbacks: Iterable[TrainerCallback] = (),
) -> Step | None:
    """Trains to the last step or a signal; returns the last line of metrics, None if there was no step.

    Args:
        folder: of the run.
        checkpoint: to go on from.
        name: what the bar shows.
        callbacks: act before gradients are checked and checkpoints are completed.
    """
    trainer.remove_callback(PrinterCallback)
    steps, done = trainer.args.max_steps, number_of(checkpoint) if checkpoint else 0
    metrics = files.MetricsFile(folder, done if checkpoint else -1)
    if checkpoint:
        display.note(f"going on after step {done} of {steps}")
    last: Step | None = None
    with display.bar(name, steps) as bar:

        def report(step: Step) -> None:
            nonlocal last, done
            last = step
            # without the clock first: these numbers are the same in every run of the same settings
            metrics.write({"step": step.number, **step.metrics, "seconds": round(step.seconds, 3)})
            if "loss" in step.metrics:
                bar.advance(step.number - done, f"{losses(step)}, {step.tokens_per_second:.0f} tokens/s")
                done = step.number
            elif "held_out/perplexity" in step.metrics:
                display.note(f"step {step.number}: held-out perplexity {step.metrics['held_out/perplexity']:.1f}")

        finite = FiniteGradients(STOP_AFTER, None, trainer.train_dataset.where)
        finite.trainer = watched.trainer = trainer
        own = (*callbacks, Metrics(report), finite, watched, StopOnSignal(interrupts))
        for callback in (*own, Checkpoints(folder / files.CHECKPOINTS, keep)):
            trainer.add_callback(callback)
        with no_space(folder):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return last


def losses(step: Step) -> str:
    """Their sum and its parts, where there is a regularizer beside the cross-entropy."""
    said = f"loss {step.loss:.3f}"
    if (extra := step.metrics.get("regularizer")) is not None:
        said = f"loss {step.loss + extra:.3f} (cross-entropy {step.loss:.3f} + regularizer {extra:.2g})"
    return f"{said}, lr {step.metrics['learning_rate']:.2e}"

"""Adapting a pretrained Mamba: config -> data -> model -> order -> adapters and masks -> training -> export.

adapting.yaml       model, text and settings, every field
run.json            versions, seed, fingerprints, steps, allocation; written before training
metrics.jsonl, checkpoints/    as in pretraining
masks.safetensors   what the masks learned, to cut by them again
order/              scan_order.npy, its inverse, the block of each row
adapter/, peft/     the adapters, in our format and, where PEFT supports the modules, in its own
config.json, model.safetensors, tokenizer.json    the model: order folded in, adapters merged, channels removed
result.json         what was measured before and after; written last: the run is done
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from monkeyjump.bench.memory import peak_bytes
from monkeyjump.mamba.adapting.comparison import before_and_after, held_out_batches
from monkeyjump.mamba.adapting.export import export
from monkeyjump.mamba.adapting.settings import AdaptRun
from monkeyjump.mamba.adapting.stages import (
    Stages,
    calibration,
    cost_line,
    lines,
    optimizer,
    path_cost,
    prepare,
    trainable,
)
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.masks import MaskUpdate
from monkeyjump.mamba.order import OrderUpdate
from monkeyjump.mamba.text_runs.corpus import read_texts, recorded_facts
from monkeyjump.mamba.text_runs.fitting import fit, planned_steps
from monkeyjump.mamba.text_runs.opening import done_already, lay_out, stop_if_asked
from monkeyjump.mamba.text_runs.saving import save_model
from monkeyjump.mamba.text_runs.settings import begun, on_interrupt, write_settings
from monkeyjump.mamba.text_runs.trainer import HeldOut, WindowTrainer, training_arguments
from monkeyjump.mamba.text_runs.windows import Windows, collate, encode, windows_in
from monkeyjump.mamba.texts import Documents, first_of
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import check_model, load_tokenizer
from monkeyjump.training import folder as files
from monkeyjump.training.callbacks import Step
from monkeyjump.training.checkpoints import ASIDE, clear_aside
from monkeyjump.training.run import Display
from monkeyjump.training.signals import Interrupts

WATCHED = 60_000  # characters of the held-out text that are scored on the way


@dataclass(frozen=True)
class Prepared:
    """The untouched model and the one that trains."""

    dense: Any
    model: Any
    stages: Stages
    tokenizer: Any
    stream: np.ndarray
    train: Documents
    held_out: Documents


@dataclass(frozen=True)
class Fitted:
    """The stages with the order as it is after the last update, the last step, and the last line of metrics."""

    stages: Stages
    step: int
    last: Step | None


def adapt(run: AdaptRun, display: Display, resume: bool = False) -> Path:
    """Adapts, and returns the run's folder. A run that is done already is left as it is with `resume`.

    Raises:
        InputError: before any training, and with nothing left behind.
        Interrupted: by a signal; what was reached is saved.
        FloatingPointError: no finite gradient in several steps in a row.
        SaveFailed: the disk is full.
    """
    folder = run.output
    started = begun(run, resume)
    if started and done_already(run, display):
        return folder
    with Interrupts(on_interrupt(run, started)) as interrupts:
        with files.made(folder, "--output"):
            found = _prepare(run, display)
            facts = _facts(run, found)
            write_settings(run)
        interrupts.going_on = on_interrupt(run, begun=True)
        checkpoint = lay_out(run, found.tokenizer, facts)
        for line in lines(found.stages, found.model):
            display.note(line)
        fitted = _fit(run, found, facts["steps"], checkpoint, interrupts, display)
        stop_if_asked(run, interrupts, fitted.step)
    _finish(run, found, fitted, facts, display)
    return folder


def _prepare(run: AdaptRun, display: Display) -> Prepared:
    settings = run.settings
    check_model(run.model)
    train, held_out = read_texts(run.text, run.held_out_text, settings.held_out, settings.seed, display)
    tokenizer = load_tokenizer(run.model)
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer of '{run.model}' has no end-of-text token to part documents with")
    dense = load_model(run.model).float()
    try:
        channel_groups(dense)
    except ValueError as error:
        raise InputError(str(error)) from error
    stream = encode(tokenizer, train.texts)
    windows_in(stream, settings.context_length)
    model = copy.deepcopy(dense)
    stages = prepare(model, settings, calibration(stream, settings))
    return Prepared(dense, model, stages, tokenizer, stream, train, held_out)


def _facts(run: AdaptRun, found: Prepared) -> dict[str, Any]:
    prints = {"text": found.train.fingerprint, "held_out": found.held_out.fingerprint}
    if (before := recorded_facts(run, prints)) is not None:
        return before
    steps, seconds = planned_steps(run.settings, found.stream, copy.deepcopy(found.dense))
    trained, total = trainable(found.model)
    plan = found.stages.plan
    return {
        "command": sys.argv,
        "seeds": {"train": run.settings.seed},
        "fingerprints": prints,
        "steps": steps,
        "measured_seconds_per_step": seconds,
        "trainable_parameters": trained,
        "parameters": total,
        "path_cost": path_cost(found.stages.order),
        "allocation": None if plan is None else plan.as_record(),
    }


def _fit(
    run: AdaptRun, found: Prepared, steps: int, checkpoint: Path | None, interrupts: Interrupts, display: Display
) -> Fitted:
    settings, folder, stages = run.settings, run.output, found.stages
    windows = Windows(found.stream, settings.context_length, steps * settings.batch_size, settings.seed)
    arguments = training_arguments(settings, steps, folder / files.CHECKPOINTS / ASIDE)
    own = optimizer(found.model, settings, stages.masks)
    trainer = WindowTrainer(
        found.model, arguments, train_dataset=windows, data_collator=collate, optimizers=(own, None)
    )
    callbacks: list[Any] = [] if stages.masks is None else [MaskUpdate(stages.masks)]
    update = None
    if stages.order is not None:
        update = OrderUpdate(stages.order, calibration(found.stream, settings), settings.scan_update_frequency)
        if checkpoint:
            update.resume(checkpoint)
        callbacks += [update, OrderNotes(update, display)]
    watched = HeldOut(found.tokenizer, first_of(found.held_out.texts, WATCHED), settings)
    last = fit(trainer, watched, folder, settings.keep, checkpoint, interrupts, display, "adapt", callbacks)
    order = None if update is None else update.order
    return Fitted(Stages(order, stages.plan, stages.masks), trainer.state.global_step, last)


class OrderNotes(TrainerCallback):
    """Says what an order of the channels that was measured anew has changed."""

    def __init__(self, update: OrderUpdate, display: Display) -> None:
        self.update, self.display, self.seen = update, display, update.order.updates

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        order = self.update.order
        if order.updates == self.seen:
            return
        self.seen = order.updates
        cost = path_cost(order)
        said = "" if cost is None else f", path cost {cost_line(cost)}"
        self.display.note(f"step {state.global_step}: channel order measured and folded in again{said}")


def _finish(run: AdaptRun, found: Prepared, fitted: Fitted, facts: dict[str, Any], display: Display) -> None:
    folder, settings, model = run.output, run.settings, found.model
    training = _training(found, fitted, settings, folder)
    model.eval()
    batches = held_out_batches(encode(found.tokenizer, found.held_out.texts), settings)
    exported = export(model, fitted.stages, folder, batches, display)
    save_model(model, folder)
    display.note("measuring before and after")
    order = fitted.stages.order
    result = {
        "steps": facts["steps"],
        "trainable_parameters": facts["trainable_parameters"],
        "parameter_reduction": 1 - facts["trainable_parameters"] / found.dense.num_parameters(),
        "training": training,
        "order": None if order is None else {"seconds": order.seconds, "updates": order.updates},
        "path_cost": facts["path_cost"],
        **exported,
        "target_sparsity": settings.target_sparsity if settings.masks else None,
        **before_and_after(found.dense, model, order, found.tokenizer, found.held_out.texts, settings),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    files.write_json(folder / files.RESULT, result)  # last: from here on the run is done
    clear_aside(folder / files.CHECKPOINTS)


def _training(found: Prepared, fitted: Fitted, settings: Any, folder: Path) -> dict[str, Any]:
    """Speed and memory of this process; a run that goes on has those of its last part."""
    speed = None if fitted.last is None else fitted.last.tokens_per_second
    reached = None
    if settings.target_loss is not None:
        lines = files.MetricsFile.lines(folder)
        reached = next((line["step"] for line in lines if line.get("loss", math.inf) < settings.target_loss), None)
    return {
        "tokens_per_second": speed,
        "epoch_seconds": None if speed is None else len(found.stream) / speed,
        "process_peak_bytes": peak_bytes(found.model.device.type),
        "target_loss": settings.target_loss,
        "steps_to_target_loss": reached,
    }

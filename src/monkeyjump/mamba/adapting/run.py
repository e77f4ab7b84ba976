"""Adapting a pretrained Mamba: config -> data -> model -> order -> adapters and masks -> training -> export.

adapting.yaml       model, text and settings, every field
run.json            versions, seed, fingerprints, steps, allocation; written before training
metrics.jsonl, checkpoints/    as in pretraining
order/              scan_order.npy, its inverse, the block of each row
adapter/, peft/     the adapters, in our format and, where PEFT supports the modules, in its own
config.json, model.safetensors, tokenizer.json    the model, adapters merged and channels removed
result.json         what was measured before and after; written last: the run is done
"""

from __future__ import annotations

import copy
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monkeyjump.mamba.adapting.export import export
from monkeyjump.mamba.adapting.measures import efficiency, latency
from monkeyjump.mamba.adapting.settings import AdaptRun
from monkeyjump.mamba.adapting.stages import Stages, lines, optimizer, prepare, trainable
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.masks import MaskUpdate
from monkeyjump.mamba.order import OrderUpdate
from monkeyjump.mamba.perplexity import perplexity
from monkeyjump.mamba.text_runs.trainer import HeldOut, WindowTrainer, training_arguments
from monkeyjump.mamba.text_runs.windows import Windows, collate, encode, windows_in
from monkeyjump.mamba.text_runs.corpus import read_texts, recorded_facts
from monkeyjump.mamba.text_runs.fitting import fit, planned_steps
from monkeyjump.mamba.text_runs.opening import done_already, lay_out, stop_if_asked
from monkeyjump.mamba.text_runs.saving import save_model
from monkeyjump.mamba.text_runs.settings import begun, going_on, write_settings
from monkeyjump.mamba.texts import Documents, first_of
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.models import check_model, load_tokenizer
from monkeyjump.training import folder as files
from monkeyjump.training.checkpoints import ASIDE, clear_aside
from monkeyjump.training.run import Display
from monkeyjump.training.signals import Interrupts

WATCHED = 60_000  # characters of the held-out text that are scored on the way
CALIBRATION = 1_000_003  # apart from the seeds of training windows


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
    with Interrupts(f"interrupted; {going_on(run)}") as interrupts:
        with files.made(folder, "--output"):
            found = _prepare(run, display)
            facts = _facts(run, found)
            write_settings(run)
        checkpoint = lay_out(run, found.tokenizer, facts)
        for line in lines(found.stages, found.model):
            display.note(line)
        stages, step = _fit(run, found, facts["steps"], checkpoint, interrupts, display)
        stop_if_asked(run, interrupts, step)
    _finish(run, found, stages, facts, display)
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


def calibration(stream: np.ndarray, settings: Any) -> list[dict[str, Any]]:
    """The batches that orders and importance are measured on."""
    size = settings.batch_size
    windows = Windows(stream, settings.context_length, settings.calibration_batches * size, CALIBRATION + settings.seed)
    made = [collate(windows[n * size + i] for i in range(size)) for n in range(settings.calibration_batches)]
    return [{name: values for name, values in batch.items() if name != "row_ids"} for batch in made]


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
        "allocation": None if plan is None else plan.as_record(),
    }


def _fit(
    run: AdaptRun, found: Prepared, steps: int, checkpoint: Path | None, interrupts: Interrupts, display: Display
) -> tuple[Stages, int]:
    """The stages with the order as it is after the last update, and the last step."""
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
        callbacks.append(update)
    watched = HeldOut(found.tokenizer, first_of(found.held_out.texts, WATCHED), settings)
    fit(trainer, watched, folder, settings.keep, checkpoint, interrupts, display, "adapt", callbacks)
    order = None if update is None else update.order
    return Stages(order, stages.plan, stages.masks), trainer.state.global_step


def _finish(run: AdaptRun, found: Prepared, stages: Stages, facts: dict[str, Any], display: Display) -> None:
    folder, settings, model = run.output, run.settings, found.model
    model.eval()
    exported = export(model, stages, folder, display)
    save_model(model, folder)
    display.note("measuring before and after")
    result = {
        "steps": facts["steps"],
        "trainable_parameters": facts["trainable_parameters"],
        "parameters_trained_share": facts["trainable_parameters"] / facts["parameters"],
        **exported,
        "target_sparsity": settings.target_sparsity if settings.masks else None,
        **before_and_after(found.dense, model, stages.order, found.tokenizer, found.held_out.texts, settings),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    files.write_json(folder / files.RESULT, result)  # last: from here on the run is done
    clear_aside(folder / files.CHECKPOINTS)


def before_and_after(
    dense: Any, model: Any, order: Any, tokenizer: Any, texts: list[str], settings: Any
) -> dict[str, Any]:
    """Held-out perplexity, latency and efficiency of both models; latency also of the order alone."""
    from monkeyjump.mamba.order import fold

    length, size = settings.context_length, settings.batch_size
    stream = encode(tokenizer, texts)
    length = min(length, len(stream))
    windows = Windows(stream, length, 4 * size, settings.seed)
    batches = [{"input_ids": torch.stack([windows[n * size + i]["input_ids"] for i in range(size)])} for n in range(4)]
    models = {"before": dense}
    if order is not None:
        models["order alone"] = copy.deepcopy(dense)
        fold(models["order alone"], order.orders)
    models["after"] = model
    stride = max(1, length // 2)
    scores = {
        name: perplexity(models[name], tokenizer, texts, max(2, length), stride, size).record()
        for name in ("before", "after")
    }
    return {
        "held_out": {"window": length, "stride": stride, **scores},
        "latency": latency(models, batches[0]),
        "efficiency": {name: efficiency(models[name], batches) for name in ("before", "after")},
    }

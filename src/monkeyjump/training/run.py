"""A run from its config to its folder: data, model, centers, training, adapter.

Every stage either leaves nothing or something that the next start of the same run takes up, so a process may
be killed at any moment: `resume=True` goes on, and ends with the numbers of a run that was never stopped.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from monkeyjump.tasks import Collator, InputError
from monkeyjump.training import folder as files
from monkeyjump.training.adapters import adapter_config, add_adapter
from monkeyjump.training.arguments import check_machine, total_steps
from monkeyjump.training.building import Rows, build_model, start_centers
from monkeyjump.training.callbacks import Step, barrier
from monkeyjump.training.checkpoints import clear_aside, latest, number_of
from monkeyjump.training.config import RunConfig
from monkeyjump.training.coverage import coverage
from monkeyjump.training.data import RunCollator, RunData, describe, prepare
from monkeyjump.training.display import Display
from monkeyjump.training.fit import Fitted, Watch, fit
from monkeyjump.training.models import place_of, skeleton
from monkeyjump.training.routing_log import RoutingLog, centers_of
from monkeyjump.training.saving import save_adapter, try_saving
from monkeyjump.training.signals import Interrupted, Interrupts

GO_ON = "go on with: monkeyjump train {folder} --resume"


def train_run(config: RunConfig, display: Display, resume: bool = False) -> Path:
    """Trains, and returns the run's folder. A run that is done already is left as it is with `resume`.

    Raises:
        InputError: before any long work, and with nothing left behind.
        Interrupted: by a signal; what was reached is saved.
        FloatingPointError, SaveFailed: see `fit`.
    """
    folder = config.output.folder
    state = PartialState(cpu=not torch.cuda.is_available())  # one process, or one of several
    going_on = _check_folder(folder, config, resume)
    if going_on and files.is_done(folder):
        display.note(f"{folder} is done already")
        return folder
    check_machine(config.train)
    with Interrupts(f"interrupted; {GO_ON.format(folder=folder)}") as interrupts:
        place = place_of(config.model, display.note)
        _check_adapter(config, place)
        with files.made(folder), state.main_process_first():
            data = prepare(config.data, place, display.note)
        if state.is_main_process:
            _check_data(folder, data, going_on)
            files.write_config(folder, config)
            (folder / files.CHECKPOINTS).mkdir(exist_ok=True)
            clear_aside(folder / files.CHECKPOINTS)
            files.clear(folder)
        barrier()
        checkpoint = latest(folder / files.CHECKPOINTS) if going_on else None
        model, log, collate = _prepare_model(config, place, data, checkpoint, display, state)
        fitted = _fit(config, model, log, collate, data, checkpoint, interrupts, display, state)
        if interrupts.received:
            step = fitted.trainer.state.global_step
            raise Interrupted(f"interrupted; step {step} is saved; {GO_ON.format(folder=folder)}", interrupts.received)
        _finish(config, fitted, model, state)
    return folder


def _check_folder(folder: Path, config: RunConfig, resume: bool) -> bool:
    """Whether there is something to go on with."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output.folder: {folder} is a file", hint="name a folder, which is made if need be")
    if not files.is_run(folder):
        return False
    if not resume:
        raise InputError(
            f"output.folder: {folder} holds a run already",
            hint="add --resume to go on with it, or choose another output.folder",
        )
    files.check_same(folder, config)
    return True


def _check_adapter(config: RunConfig, place: str) -> None:
    """Puts the adapter on the model's skeleton: what does not fit is told before anything is written."""
    base = skeleton(config.model, place)
    add_adapter(base, adapter_config(config.method, base, tasks=[task.name for task in describe(config.data)]), place)


def _check_data(folder: Path, data: RunData, going_on: bool) -> None:
    if not going_on or not (folder / files.FACTS).is_file():
        return
    before = files.read_json(folder / files.FACTS)["fingerprints"]
    changed = [name for name, value in data.fingerprints().items() if before.get(name) != value]
    if changed:
        raise InputError(
            f"{folder}: the data are not those that the run was begun with: {', '.join(changed)}",
            hint="restore the files, or begin a new run in another output.folder",
        )


def _prepare_model(
    config: RunConfig, place: str, data: RunData, checkpoint: Path | None, display: Display, state: PartialState
) -> tuple[Any, RoutingLog | None, RunCollator]:
    folder = config.output.folder
    steps = total_steps(config.train, len(data.train), state.num_processes)
    display.note("loading the model")
    model = build_model(config, place, steps)
    collate = RunCollator(Collator.of(data.prompts.tokenizer))
    start = folder / files.CENTERS
    if checkpoint is None and config.method.routed:
        display.note("initializing the centers")
        start_centers(model, data.train, collate, config.method.centers)
        if state.is_main_process:
            save_file(centers_of(model), start)
    if state.is_main_process:
        _write_facts(folder, config, data, model, steps, state.num_processes)
        try_saving(model, folder)
    barrier()
    if not config.method.routed:
        return model, None, collate
    batch = collate([data.train[i] for i in _fixed(len(data.train), config.train.routing_rows)])
    return model, RoutingLog(model, batch, data.names, load_file(start)), collate


def _fixed(rows: int, count: int) -> list[int]:
    """The rows of the routing statistics: the same for every method and seed."""
    return np.random.default_rng(0).permutation(rows)[:count].tolist()


def _write_facts(folder: Path, config: RunConfig, data: RunData, model: Any, steps: int, processes: int) -> None:
    found = coverage(model)
    files.write_facts(
        folder,
        {
            "command": sys.argv,
            "seeds": {
                "train": config.train.seed,
                "data": config.data.seed,
                "centers": config.method.centers.seed,
            },
            "fingerprints": data.fingerprints(),
            "rows_per_epoch": dict(data.train.blend.rows),
            "test_rows": {loaded.task.name: len(loaded.test) for loaded in data.tasks},
            "dropped": {loaded.task.name: data.dropped(loaded) for loaded in data.tasks},
            "steps": steps,
            "processes": processes,
            "trainable_parameters": found.trainable_parameters,
            "total_parameters": found.total_parameters,
            "routed": found.routed,
            "shared": found.shared,
        },
    )


def _fit(
    config: RunConfig,
    model: Any,
    log: RoutingLog | None,
    collate: RunCollator,
    data: RunData,
    checkpoint: Path | None,
    interrupts: Interrupts,
    display: Display,
    state: PartialState,
) -> Fitted:
    folder = config.output.folder
    rows: Rows = data.train
    done = number_of(checkpoint) if checkpoint else 0
    metrics = files.MetricsFile(folder, done if checkpoint else -1) if state.is_main_process else None
    total = total_steps(config.train, len(rows), state.num_processes)
    if checkpoint:
        display.note(f"going on after step {done} of {total}")
    with display.bar("train", total) as bar:
        last = done

        def report(step: Step) -> None:
            nonlocal last
            if metrics is None:  # another process writes them
                return
            # without the clock first: these numbers are the same in every run of the same config
            metrics.write({"step": step.number, **step.metrics, "seconds": round(step.seconds, 3)})
            if "loss" in step.metrics:
                bar.advance(step.number - last, f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s")
                last = step.number

        watch = Watch(
            report=report,
            where=data.train.where,
            folder=folder / files.CHECKPOINTS,
            resume=checkpoint,
            routing=log,
            interrupts=interrupts,
        )
        return fit(model, rows, collate, config.train, config.method.centers, data.names, folder, watch)


def _finish(config: RunConfig, fitted: Fitted, model: Any, state: PartialState) -> None:
    folder = config.output.folder
    trainer = fitted.trainer
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded:  # every rank takes part in gathering the weights
        aside = folder / files.CHECKPOINTS / "gathered"
        trainer.save_model(str(aside))
        barrier()
    if state.is_main_process:
        write = (lambda place: shutil.copytree(aside, place, dirs_exist_ok=True)) if sharded else None
        save_adapter(model, folder / files.ADAPTER, write)
        if sharded:
            shutil.rmtree(aside)
        clear_aside(folder / files.CHECKPOINTS)
        files.write_json(  # last: from here on the run is done
            folder / files.RESULT,
            {
                "steps": fitted.steps,
                "tokens": fitted.tokens,
                "seconds": round(fitted.seconds, 3),
                "losses": fitted.losses,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            },
        )
    barrier()

"""`monkeyjump train`: its options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from monkeyjump.cli.plan import Debug, Overrides, Preset
from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's YAML file, or the folder of a run begun.")],
    overrides: Overrides = None,
    preset: Preset = None,
    methods: Annotated[
        str | None, typer.Option(help="Train each of these: lora, mj-lora, ... into output.folder/METHOD-seedN.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Train with each of these seeds, such as 0,1,2.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output.folder.")] = False,
    debug: Debug = False,
) -> int:
    """Train an adapter as a run's file says.

    Everything goes into output.folder: the config with every field, versions, seeds, fingerprints of the data,
    metrics.jsonl, checkpoints that are complete or absent, the adapter. Ctrl-C saves and says how to go on; after
    a kill, --resume goes on from the last complete checkpoint and ends with the same numbers.

    On several processes: torchrun --nproc-per-node 2 -m monkeyjump train RUN.yaml, or accelerate launch.

    Examples:

      monkeyjump train run.yaml

      monkeyjump train run.yaml train.seed=1 output.folder=runs/seed1

      monkeyjump train runs/seed1 --resume

      monkeyjump train run.yaml --methods lora,mj-lora --seeds 0,1,2
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.training.folder import open_run
    from monkeyjump.training.read import read_run
    from monkeyjump.training.run import train_run
    from monkeyjump.training.sweep import sweep

    quiet()
    screen = Screen()
    if run.is_dir():
        if overrides:
            raise InputError(f"{run}: a run that was begun takes no overrides", hint="give its YAML file instead")
        config = open_run(run)
    else:
        config = read_run(run, overrides or (), preset)
    if methods is None and seeds is None:
        folder = train_run(config, screen, resume)
    else:
        folder = config.output.folder
        for one in sweep(config, _names(methods), _numbers(seeds)):
            screen.note(f"\n{one.output.folder}")
            train_run(one, screen, resume)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        screen.say(f"{folder}: done. Next: monkeyjump evaluate {folder}")
    return 0


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in given.split(",")] if given else []


def _numbers(given: str | None) -> list[int]:
    names = _names(given)
    wrong = next((name for name in names if not name.isdigit()), None)
    if wrong is not None:
        raise InputError(f"--seeds: '{wrong}' is no seed", hint="whole numbers from 0 on, such as 0,1,2")
    return [int(name) for name in names]

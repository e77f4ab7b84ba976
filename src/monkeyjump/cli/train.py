"""`monkeyjump train`: its options."""

from __future__ import annotations

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
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.training.folder import open_run
    from monkeyjump.training.read import read_run
    from monkeyjump.training.run import train_run

    quiet()
    screen = Screen()
    if run.is_dir():
        if overrides:
            raise InputError(f"{run}: a run that was begun takes no overrides", hint="give its YAML file instead")
        config = open_run(run)
    else:
        config = read_run(run, overrides or (), preset)
    folder = train_run(config, screen, resume)
    screen.say(f"{folder}: done. Next: monkeyjump evaluate {folder}")
    return 0

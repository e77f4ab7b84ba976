"""`monkeyjump demo`: its options."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.reading import catalog


class SizeOption(str, Enum):
    small = "small"
    full = "full"


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="A Hub id or a local folder (config.json, tokenizer, safetensors). "
            "Default: SmolLM2-135M-Instruct, from the package registry."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A task of the catalog ({', '.join(catalog('demo'))}) or a YAML file of your own; "
            "repeat for several. Default: all of the catalog."
        ),
    ] = None,
    size: Annotated[
        SizeOption,
        typer.Option(
            help="small: minutes on two CPU cores. full: tighter intervals, 20 times the rows, about an hour."
        ),
    ] = SizeOption.small,
    output: Annotated[
        Path, typer.Option(help="Where the adapter and results.json go; older ones there are replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Sampling of rows, adapter weights, order, dropout.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train routed adapters on real tasks and compare them with plain LoRA and the untouched model.

    Fetches a model and four text tasks, says what it is going to do, trains, shows accuracies with
    95 % intervals, saves the adapter, and reloads it in a new process. The first run downloads about
    100 MB through pip into ~/.cache/monkeyjump (MONKEYJUMP_HOME changes that); later runs need no network.

    A task of your own is one YAML file; the package's folder tasks/catalog has examples.

    Examples:

      monkeyjump demo

      monkeyjump demo --tasks tweets --tasks my-task.yaml --seed 1

      monkeyjump demo --model ./my-model --size full --output runs/mine
    """
    if seed < 0:
        raise InputError(f"--seed: {seed} is below 0", hint="any whole number from 0 on")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file", hint="name a folder, which is made if need be")
    from monkeyjump.cli.demo_run import DemoOptions, run_demo  # torch and transformers take seconds; --help should not

    run_demo(DemoOptions(model, tuple(tasks or catalog("demo")), size.value, output, seed))

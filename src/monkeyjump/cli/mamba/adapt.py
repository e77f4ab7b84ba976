"""`monkeyjump mamba adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monkeyjump.cli.mamba.before_and_after import show_before_and_after
from monkeyjump.cli.mamba.settings import (
    TEXT_HELP,
    Changes,
    Epochs,
    HeldOut,
    Minutes,
    Preset,
    Resume,
    Steps,
    given_fields,
)
from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError


def adapt(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder of `pretrain`, or a Hub id.")] = None,
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help=TEXT_HELP)] = None,
    output: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/adapted"),
    held_out: HeldOut = None,
    order: Annotated[bool | None, typer.Option("--order/--no-order", help="Channel order.")] = None,
    masks: Annotated[bool | None, typer.Option("--masks/--no-masks", help="Learned masks, shrinking.")] = None,
    adapters: Annotated[bool | None, typer.Option("--adapters/--no-adapters", help="Hybrid PEFT.")] = None,
    peft_format: Annotated[
        bool, typer.Option("--peft-format", help="Adapt only modules that PEFT's own format can hold; writes peft/.")
    ] = False,
    preset: Preset = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    seed: Annotated[int | None, typer.Option(help="Of adapters, masks, windows and held-out documents.")] = None,
    changes: Changes = None,
    resume: Resume = False,
    debug: Debug = False,
) -> int:
    """Adapt a pretrained Mamba: channel order, learned masks, adapters where they matter, a smaller model.

    An order of the channels is folded into the weights, modules are ranked by importance and get LoRA, IA³ or
    nothing, masks learn which channels go. The model in the folder has the adapters merged and the channels
    removed; the adapters, the masks and the order stand beside it. Without adapters all weights train.

    Examples:

      monkeyjump mamba adapt runs/mamba news.txt --output runs/news --minutes 10

      monkeyjump mamba adapt runs/mamba news.txt --output runs/lora --no-order --no-masks

      monkeyjump mamba adapt runs/mamba news.txt --output runs/peft --no-masks --peft-format

      monkeyjump mamba adapt --output runs/news --resume
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.adapting import AdaptRun, open_adapting
    from monkeyjump.mamba.adapting import adapt as adapt_run
    from monkeyjump.mamba.presets import DEFAULT_PRESET, adapting_config

    quiet()
    screen = Screen()
    given = given_fields(
        "adapt", changes, minutes=minutes, max_steps=steps, num_epochs=epochs, seed=seed,
        order=order, masks=masks, adapters=adapters, peft_format=peft_format or None,
    )  # fmt: skip
    if resume and not (model or text or held_out or preset or given):
        run = open_adapting(output)
    else:
        if not (model and text):
            raise InputError("MODEL and TEXT are missing", hint="monkeyjump mamba adapt runs/mamba news.txt")
        settings = adapting_config(preset or DEFAULT_PRESET, **given)
        place = str(Path(model).resolve()) if Path(model).exists() else model
        run = AdaptRun(model=place, text=text, held_out_text=held_out or [], settings=settings, output=output)
    show_before_and_after(adapt_run(run, screen, resume), screen)
    return 0

"""`monkeyjump mamba shrink`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monkeyjump.cli.mamba.before_and_after import show_before_and_after
from monkeyjump.cli.mamba.settings import TEXT_HELP
from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen


def shrink(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder of `pretrain` or `adapt`, or a Hub id.")],
    text: Annotated[list[str], typer.Option(help=f"To score channels and models on; repeatable. {TEXT_HELP}")],
    output: Annotated[Path, typer.Option(help="The smaller model's folder.")],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the channels that go: 0.5, or what the masks were learned for.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="A run of `adapt`, or its masks.safetensors: cut by what it learned.")
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="Text for the perplexity; repeatable. Else a share of --text is kept apart."),
    ] = None,
    order: Annotated[
        str | None, typer.Option(help="importance, correlation, random or identity, folded first.")
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Neighboring channels that go or stay together.")] = 1,
    repair: Annotated[bool, typer.Option("--repair", help="Fit out_proj to the dense model by least squares.")] = False,
    seed: Annotated[int, typer.Option(help="Of windows, random orders and held-out documents.")] = 0,
    debug: Debug = False,
) -> int:
    """Make a Mamba physically smaller, without training: channels with the lowest Taylor scores go.

    With --masks the scores are the logits that a run of `adapt` has learned on this MODEL; its own sparsity gives its
    own choice, another one chooses anew, over the whole model at one budget.

    Examples:

      monkeyjump mamba shrink runs/mamba --text valid.txt --sparsity 0.5 --repair --output runs/half

      monkeyjump mamba shrink runs/mamba --text valid.txt --masks runs/news --sparsity 0.6 --output runs/more

      monkeyjump mamba shrink runs/mamba --text valid.txt --order correlation --block 16 --output runs/blocks
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.mamba.adapting import ShrinkRequest, shrink_model

    quiet()
    screen = Screen()
    request = ShrinkRequest(
        model=model, text=text, output=output, sparsity=sparsity, masks=masks, held_out_text=held_out or [],
        order=order, block=block, repair=repair, seed=seed,
    )  # fmt: skip
    shrink_model(request, screen)
    show_before_and_after(output, screen)
    return 0

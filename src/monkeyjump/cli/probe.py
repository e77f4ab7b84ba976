"""`monkeyjump probe`: linear probes of a run's hidden states."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from monkeyjump.cli.evaluate import BaseModel, Tasks
from monkeyjump.cli.plan import Debug
from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError

if TYPE_CHECKING:
    from monkeyjump.evaluation.probes import Probe


def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of an adapter alone.")],
    tasks: Tasks = None,
    model: BaseModel = None,
    layers: Annotated[str | None, typer.Option(help="Blocks, such as 15,23. Default: the middle and the last.")] = None,
    limit: Annotated[int, typer.Option(min=4, help="At most so many training and test rows of each task.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    debug: Debug = False,
) -> int:
    """Say how well each task's answer can be read off the hidden states, by block, token and pooling (Fig. 6a, b).

    A logistic regression on the states that enter a block: at the first token, the last, the 10th, 20th and 30th
    from the end of the prompt, and pooled by mean, maximum and attention. Trained on training rows, scored on test
    rows. Only tasks with closed answers. Numbers go into RUN/evaluation/probes.json.

    Examples:

      monkeyjump probe runs/mine --layers 15,23

      monkeyjump probe my-adapter --tasks boolq
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.evaluation.probing import probe_run
    from monkeyjump.training.folder import to_json
    from monkeyjump.training.subject import open_subject

    quiet()
    screen = Screen()
    found = probe_run(open_subject(run, model, tasks or ()), screen, _layers(layers), limit, batch_size)
    if as_json:
        print(to_json({"probes": [asdict(one) for one in found]}))
    else:
        screen.out.print(_table(found))
        screen.say("Accuracy on test rows, % (95 % interval). Chance: the most frequent answer.")
    return 0


def _layers(given: str | None) -> list[int] | None:
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    wrong = next((name for name in names if not name.isdigit()), None)
    if wrong is not None:
        raise InputError(f"--layers: '{wrong}' is no block", hint="whole numbers from 0 on, such as 15,23")
    return [int(name) for name in names]


def _table(found: list[Probe]) -> Table:
    table = Table(title="Linear probes", title_justify="left")
    for name in ("task", "block", "place", "accuracy", "chance", "rows"):
        table.add_column(name, justify="left" if name in ("task", "place") else "right")
    for one in found:
        share = one.accuracy
        cell = f"{100 * share.value:.1f} ({100 * share.low:.0f} to {100 * share.high:.0f})"
        table.add_row(one.task, str(one.layer), one.place, cell, f"{100 * one.chance:.1f}", str(one.test_rows))
    return table

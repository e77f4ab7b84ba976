"""`monkeyjump plan`: its options, and how it shows what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from monkeyjump.cli.screen import Screen
from monkeyjump.tasks.errors import InputError

if TYPE_CHECKING:
    from monkeyjump.training.plan import Plan

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[FIELD=VALUE]...", help="Overrides, such as train.learning_rate=1e-4.")
]
Preset = Annotated[
    str | None, typer.Option(help="Values for what the file leaves open: paper, paper-vision, paper-ablation, demo.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def plan(
    run: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="The run's file; or the folder of a run, or of an adapter alone.")
    ],
    overrides: Overrides = None,
    preset: Preset = None,
    model: Annotated[
        str | None, typer.Option(help="Base model of an adapter alone. Default: the one that its config names.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")] = False,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Only what config.json tells: no data, no tokenizer, no weights.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the run's file and stop.")] = False,
    debug: Debug = False,
) -> int:
    """Say what a run would do, and fail if any part of it would silently do nothing.

    Shows which projections of which blocks are adapted, routed, shared or missed; parameters; memory and disk;
    rows per task and why rows are dropped; sample prompts with the mask of the loss; tokens per expert after a
    small k-means; and whether a gradient reaches every adapter. Writes nothing. Exit code 1: it found problems.

    Examples:

      monkeyjump plan run.yaml

      monkeyjump plan run.yaml --parameters model.path=./folder-with-config.json

      monkeyjump plan my-adapter
    """
    from monkeyjump.training.config import json_schema  # torch and transformers take seconds; --help should not

    if schema:
        print(json.dumps(json_schema(), indent=1))
        return 0
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.training.folder import CONFIG, is_run, to_json
    from monkeyjump.training.plan import make_plan, plan_adapter
    from monkeyjump.training.read import read_run
    from monkeyjump.training.subject import is_adapter

    quiet()
    screen = Screen()
    alone = is_adapter(run) and not is_run(run)
    if alone and (overrides or preset):
        raise InputError(f"{run}: an adapter takes neither overrides nor a preset", hint="give the YAML file of a run")
    if model is not None and not alone:
        raise InputError("--model: only an adapter alone takes it", hint="write model.path=... after RUN.yaml")
    if alone:
        found = plan_adapter(run, model, screen.note)
    else:
        file = run / CONFIG if is_run(run) else run
        found = make_plan(read_run(file, overrides or (), preset), parameters, screen.note)
    if as_json:
        print(to_json(found.record()))
    else:
        show_plan(found, screen)
    return 1 if found.problems else 0


def show_plan(plan: Plan, screen: Screen) -> None:
    _show_parameters(plan, screen)
    _show_rows(plan, screen)
    for sample in plan.samples:
        screen.say(f"\nA row of {sample.task}: {sample.tokens} tokens, {sample.supervised} supervised")
        for text, supervised in sample.pieces:
            screen.say(f"  {'LEARNED' if supervised else 'masked '} | {text!r}")
    _show_experts(plan, screen)
    if plan.probe:
        reached = plan.probe.adapters - len(plan.probe.unreached)
        screen.say(
            f"\nProbe step: a gradient reaches {reached} of {plan.probe.adapters} adapters "
            f"(batches tried: {plan.probe.batches}; loss {plan.probe.losses[0]:.3f})"
        )
    for text in plan.left_out:
        screen.say(f"not looked at: {text}")
    for text in plan.warnings:
        screen.say(f"warning: {text}")
    for text in plan.problems:
        screen.say(f"problem: {text}")
    screen.say("\nno problem found" if not plan.problems else f"\nproblems: {len(plan.problems)}")


def _show_parameters(plan: Plan, screen: Screen) -> None:
    found = plan.coverage
    if found:
        share = found.trainable_parameters / found.total_parameters
        screen.say(f"{found.trainable_parameters:,} of {found.total_parameters:,} parameters train ({share:.3%})")
        screen.say(f"{len(found.adapted)} projections adapted in {len(found.blocks) or 'no'} routed blocks")
        for name, slots in (("routed", found.routed), ("on every token", found.shared)):
            if slots:
                screen.say(f"  {name}: {', '.join(slots)}")
    if plan.missed:
        screen.say(f"  missed: {', '.join(plan.missed)}")
    if cost := plan.estimate:
        how = "measured" if cost.measured else "estimated from shapes"
        screen.say(
            f"Memory: about {_size(cost.memory)} (weights {_size(cost.weights)}, adapters with their optimizer "
            f"{_size(cost.adapters)}, activations {_size(cost.activations)}, {how})\n"
            f"Disk: about {_size(cost.disk)} (a checkpoint takes {_size(cost.checkpoint)})"
        )


def _show_rows(plan: Plan, screen: Screen) -> None:
    if not plan.rows:
        return
    table = Table(title="Rows", title_justify="left")
    for name in ("task", "training", "test", "cut", "dropped"):
        table.add_column(name, justify="left" if name in ("task", "dropped") else "right")
    for name, row in plan.rows.items():
        dropped = "; ".join(f"{count} {reason}" for reason, count in row["dropped"].items()) or "none"
        of = "" if row["train"] == row["available"] else f" of {row['available']}"
        table.add_row(name, f"{row['train']}{of}", str(row["test"]), str(row["cut"]), dropped)
    screen.out.print(table)
    screen.say(f"{plan.steps} optimizer steps")


def _show_experts(plan: Plan, screen: Screen) -> None:
    if not plan.experts:
        return
    slots = list(dict.fromkeys(slot for block in plan.experts for slot in block.tokens))
    table = Table(title="Tokens per expert after a small k-means", title_justify="left")
    table.add_column("block")
    for slot in (*slots, "in effective use"):
        table.add_column(slot.rsplit(".", 1)[-1], justify="right")
    for block in plan.experts:
        counts = (f"{block.tokens.get(slot, 0):,}" for slot in slots)
        table.add_row(block.block, *counts, f"{block.effective:.2f} of {len(block.tokens)}")
    screen.out.print(table)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count = count // 1024 if unit == "B" else count / 1024  # type: ignore[assignment]
    return f"{count:.1f} GiB"

"""What the commands that train share: options, --set, and its fields in --help."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from monkeyjump.tasks.errors import InputError, near_miss

TEXT_HELP = "Files or folders of .txt and .jsonl (field 'text'), or dataset:config:split of the Hub."


HeldOut = Annotated[
    list[str] | None, typer.Option(help="Text for the perplexity; repeatable. Else a share of TEXT is kept apart.")
]
Preset = Annotated[str | None, typer.Option(help="laptop (the default) or mamba-readme.")]
Minutes = Annotated[float | None, typer.Option(help="Train about so long; the speed is measured first.")]
Steps = Annotated[int | None, typer.Option(help="Or so many optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Or so many passes over the text.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the list below; repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")]


class WithSettings(TyperCommand):
    """Shows, after the options, every field that --set takes, with its value in each preset."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from monkeyjump.mamba.presets import PRESETS

        table = Table("field", *PRESETS, "meaning", title="Fields of --set", title_justify="left", box=None)
        for name, field in _settings_of(ctx.command.name).model_fields.items():
            values = ("" if (v := p.get(name, field.default)) is None else str(v) for p in PRESETS.values())
            table.add_row(name, *values, field.description)
        Console(highlight=False, markup=False).print(table)


def _settings_of(command: str | None) -> Any:
    from monkeyjump.mamba.presets import Adapting, Pretraining

    return Adapting if command == "adapt" else Pretraining


def given_fields(command: str, changes: list[str] | None, **options: Any) -> dict[str, Any]:
    """The fields that the command line sets: its options, and above them --set."""
    return {name: value for name, value in options.items() if value is not None} | _changes(changes or (), command)


def _changes(given: Any, command: str) -> dict[str, Any]:
    """`field=value` strings; values as YAML reads them."""
    from omegaconf import OmegaConf

    fields = _settings_of(command).model_fields
    found: dict[str, Any] = {}
    for change in given:
        name, sign, value = change.partition("=")
        if not sign or not value:
            raise InputError(f"--set {change}: expected field=value", hint="for example --set learning_rate=1e-3")
        if name not in fields:
            raise InputError(f"--set {change}: unknown field '{name}'", hint=near_miss(name, fields))
        found[name] = OmegaConf.from_dotlist([change])[name]
    return found

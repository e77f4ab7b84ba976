"""Help that lists the fields of a run's file, made from the fields themselves."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

HELP_LENGTH = 160


class CommandWithFields(TyperCommand):
    """Shows, after the options, every field that a run's file or a dotted override may set."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        from monkeyjump.training.read import describe_fields

        table = Table("field", "default", "meaning", title="Fields of the run's file", title_justify="left", box=None)
        for name, _, default, text in describe_fields():
            sentence = text.split(". ")[0]
            table.add_row(name, default[:24], sentence[:HELP_LENGTH])
        console = Console(highlight=False, markup=False)
        console.print(table)
        console.print(
            "\nPresets (--preset, or `preset:` in the file): demo, paper, paper-vision, paper-ablation.\n"
            "method takes the fields of the PEFT method in `base` and of MonkeyJumpConfig; those of lora are shown."
        )

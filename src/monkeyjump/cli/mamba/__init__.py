"""`monkeyjump mamba`: its commands, a file each, and what they show."""

from __future__ import annotations

import typer

from monkeyjump.cli.mamba.adapt import adapt
from monkeyjump.cli.mamba.perplexity import perplexity
from monkeyjump.cli.mamba.pretrain import pretrain
from monkeyjump.cli.mamba.settings import WithSettings
from monkeyjump.cli.mamba.shrink import shrink

ABOUT = "Mamba that trains on a CPU: pretrain one on your text, adapt, shrink and score it."
app = typer.Typer(name="mamba", help=ABOUT, context_settings={"help_option_names": ["-h", "--help"]})
app.command(cls=WithSettings)(pretrain)
app.command(cls=WithSettings)(adapt)
app.command()(shrink)
app.command()(perplexity)


@app.callback(help=ABOUT)
def _commands() -> None:
    pass

"""The command line: what it offers, and how it fails (one line and a hint on stderr, an exit code)."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated

import typer

from monkeyjump import __version__
from monkeyjump.cli.bench import bench
from monkeyjump.cli.demo import demo
from monkeyjump.cli.evaluate import evaluate
from monkeyjump.cli.fields import CommandWithFields
from monkeyjump.cli.mamba import app as mamba
from monkeyjump.cli.methods import methods
from monkeyjump.cli.plan import plan
from monkeyjump.cli.probe import probe
from monkeyjump.cli.tasks import tasks
from monkeyjump.cli.train import train
from monkeyjump.tasks.errors import InputError

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# Typer re-exports BadParameter but not its parent, of which an unknown option is another child.
_UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(
    name="monkeyjump",
    help="Mixture-of-experts behaviour from the PEFT adapters a model already has.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(bench)
app.command()(methods)
app.command()(tasks)
app.command(cls=CommandWithFields)(plan)
app.command(cls=CommandWithFields)(train)
app.command()(evaluate)
app.command()(probe)
app.add_typer(mamba)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"monkeyjump {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture-of-experts behaviour from the PEFT adapters a model already has."""


def main() -> None:
    """Entry point. Exit code 0: done; 1: failed; 2: bad input; 130: interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test replaced it
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 is no reason to fail
    code = run(sys.argv[1:])
    if code == EXIT_INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not break the way out
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        code = app(arguments or ["--help"], standalone_mode=False) or 0
        if code == EXIT_INTERRUPTED:  # typer has caught the interrupt
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, typer.Abort):
        print("\nerror: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _report(error)


def _report(error: Exception) -> int:
    from monkeyjump.training.signals import Interrupted

    if isinstance(error, Interrupted):
        return _say(str(error), "", error.exit_code)
    if isinstance(error, InputError):
        return _say(str(error), error.hint, EXIT_BAD_INPUT)
    if isinstance(error, _UsageError):
        return _say(error.format_message(), "add --help to the command for its options", EXIT_BAD_INPUT)  # type: ignore[attr-defined]
    reason = f"{type(error).__name__}: {error}"
    return _say(reason, "add --debug for the traceback", EXIT_FAILED)


def _say(message: str, hint: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    return code

"""How a run on text begins and stops: what its folder holds before the first step, and after a signal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monkeyjump.mamba.text_runs.saving import save_tokenizer
from monkeyjump.mamba.text_runs.settings import TextRun, going_on
from monkeyjump.training import folder as files
from monkeyjump.training.checkpoints import clear_aside, latest
from monkeyjump.training.run import Display
from monkeyjump.training.signals import Interrupted, Interrupts


def done_already(run: TextRun, display: Display) -> bool:
    if files.is_done(run.output):
        display.note(f"{run.output} is done already")
    return files.is_done(run.output)


def lay_out(run: TextRun, tokenizer: Any, facts: dict[str, Any]) -> Path | None:
    """Tokenizer, run.json and an empty place for checkpoints, in a folder that has the settings already.

    Clears what a killed process left unfinished; returns the newest whole checkpoint, to go on from.
    """
    folder, checkpoints = run.output, run.output / files.CHECKPOINTS
    checkpoints.mkdir(exist_ok=True)
    clear_aside(checkpoints)
    files.clear(folder)
    save_tokenizer(tokenizer, folder)
    files.write_facts(folder, facts)
    return latest(checkpoints)


def stop_if_asked(run: TextRun, interrupts: Interrupts, step: int) -> None:
    """Raises Interrupted where a signal ended the training at `step`."""
    if interrupts.received:
        raise Interrupted(f"interrupted; step {step} is saved; {going_on(run)}", interrupts.received)

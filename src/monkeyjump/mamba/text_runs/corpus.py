"""The text of a run: what is trained on, what is held out, and that it is the same when a run goes on."""

from __future__ import annotations

from typing import Any

from monkeyjump.mamba.text_runs.settings import TextRun
from monkeyjump.mamba.texts import Documents, apart, hold_out, read_documents
from monkeyjump.tasks.errors import InputError
from monkeyjump.training import folder as files
from monkeyjump.training.run import Display


def read_texts(
    text: list[str], held_out_text: list[str], share: float, seed: int, display: Display
) -> tuple[Documents, Documents]:
    """Documents of `text`, and held-out ones: of `held_out_text`, or a `share` of the others, drawn by `seed`.

    Raises InputError where one of them would be empty.
    """
    train = read_documents(text, display.note)
    if held_out_text:
        held_out = read_documents(held_out_text, display.note)
    else:
        train, held_out = hold_out(train, share, seed)
    train = apart(train, held_out)
    if not held_out.texts or not train.texts:
        raise InputError(
            f"{train.origin}: no text is left beside the part that is held out for perplexity", hint="give more text"
        )
    return train, held_out


def recorded_facts(run: TextRun, prints: dict[str, str]) -> dict[str, Any] | None:
    """run.json without the versions; None before it is written. Raises InputError if the text is another now."""
    path = run.output / files.FACTS
    if not path.is_file():
        return None
    before = files.read_json(path)
    if before["fingerprints"] != prints:
        raise InputError(
            f"{run.output}: the text is not the one that the run was begun with",
            hint="restore the files, or begin a new run in another folder",
        )
    return {name: value for name, value in before.items() if name != "versions"}

"""One run on text as a file of its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.reading import read_mapping
from monkeyjump.training.config import Section
from monkeyjump.training.problems import explain

FREE = ("output", "settings.keep")  # nothing that is learned depends on them


class TextRun(Section):
    """`text`, `held_out_text`: files, folders or dataset:config:split. No text: the demo's packages."""

    file: ClassVar[str]  # its name in the folder
    command: ClassVar[str]  # what makes and resumes it

    text: list[str] = Field(default=[])
    held_out_text: list[str] = Field(default=[])
    settings: Any
    output: Path


Run = TypeVar("Run", bound=TextRun)


def open_text_run(kind: type[Run], folder: Path) -> Run:
    """The run of a folder, wherever it has been moved to. Raises InputError."""
    path = folder / kind.file
    if not path.is_file():
        raise InputError(
            f"--resume: {folder} holds no run to go on with",
            hint="check --output, or give the whole command to start one",
        )
    try:
        return kind.model_validate({**read_mapping(path, "fields"), "output": folder})
    except ValidationError as error:
        problems = explain(error, kind.model_fields)
    raise InputError(f"{path}: {'; '.join(text for text, _ in problems)}", hint="; ".join(h for _, h in problems if h))


def write_settings(run: TextRun) -> None:
    """Every field, paths made absolute."""
    text = OmegaConf.to_yaml(OmegaConf.create(_absolute(run).model_dump(mode="json")))
    write_in_one_piece(run.output / run.file, text)


def begun(run: TextRun, resume: bool) -> bool:
    """Whether the folder holds something to go on with.

    Raises InputError for a folder that holds something else, another run, or this one without `resume`.
    """
    folder = run.output
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{run.command} runs in one process", hint="start it without torchrun or accelerate launch")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file", hint="name a folder, which is made if need be")
    if not (folder / run.file).is_file():
        if folder.is_dir() and any(path for path in folder.iterdir() if not path.name.startswith(".")):
            raise InputError(f"--output: {folder} holds something else", hint="name a new folder")
        return False
    if not resume:
        raise InputError(
            f"--output: {folder} holds a run already", hint="add --resume to go on with it, or name another folder"
        )
    check_same(run)
    return True


def check_same(run: TextRun) -> None:
    """Refuses to go on with other settings than the run was begun with. Raises InputError naming them."""
    before, now = _flat(open_text_run(type(run), run.output)), _flat(_absolute(run))
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        said = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed[:5])
        raise InputError(
            f"{run.output} was begun with other settings: {said}",
            hint="--output and --resume alone go on with the old ones",
        )


def going_on(run: TextRun) -> str:
    return f"go on with: monkeyjump {run.command} --output {run.output} --resume"


def on_interrupt(run: TextRun, begun: bool) -> str:
    """What a signal's message says; before the settings are written there is nothing to go on with."""
    return f"interrupted; {going_on(run) if begun else 'nothing is kept yet: give the whole command again'}"


def absolute_place(name: str) -> str:
    """A path that exists made absolute, any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _absolute(run: Run) -> Run:
    places: dict[str, Any] = {name: [*map(absolute_place, getattr(run, name))] for name in ("text", "held_out_text")}
    return run.model_copy(update={**places, "output": run.output.resolve()})


def _flat(run: TextRun) -> dict[str, object]:
    dumped = run.model_dump(mode="json")
    flat = {f"settings.{name}": value for name, value in dumped.pop("settings").items()} | dumped
    return {name: value for name, value in flat.items() if name not in FREE}

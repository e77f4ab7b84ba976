"""One pretraining run as a file: `pretraining.yaml` of its folder."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf
from pydantic import Field, ValidationError

from monkeyjump.mamba.presets import Pretraining
from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.reading import read_mapping
from monkeyjump.training.config import Section
from monkeyjump.training.problems import explain

SETTINGS = "pretraining.yaml"
FREE = ("output", "settings.keep")  # nothing that is learned depends on them


class PretrainRun(Section):
    """`text`, `held_out_text`: files, folders or dataset:config:split. No text: the demo's packages."""

    text: list[str] = Field(default=[])
    held_out_text: list[str] = Field(default=[])
    settings: Pretraining
    output: Path


def open_pretraining(folder: Path) -> PretrainRun:
    """The run of a folder, wherever it has been moved to. Raises InputError."""
    path = folder / SETTINGS
    if not path.is_file():
        raise InputError(f"{folder}: no {SETTINGS} in it", hint="`monkeyjump mamba pretrain` makes one")
    try:
        return PretrainRun.model_validate({**read_mapping(path, "fields"), "output": folder})
    except ValidationError as error:
        problems = explain(error, PretrainRun.model_fields)
    raise InputError(f"{path}: {'; '.join(text for text, _ in problems)}", hint="; ".join(h for _, h in problems if h))


def write_settings(run: PretrainRun) -> None:
    """Every field, paths made absolute."""
    text = OmegaConf.to_yaml(OmegaConf.create(_absolute(run).model_dump(mode="json")))
    write_in_one_piece(run.output / SETTINGS, text)


def check_same(run: PretrainRun) -> None:
    """Refuses to go on with other settings than the run was begun with. Raises InputError naming them."""
    before, now = _flat(open_pretraining(run.output)), _flat(_absolute(run))
    changed = [name for name in now if before[name] != now[name]]
    if changed:
        said = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in changed[:5])
        raise InputError(
            f"{run.output} was begun with other settings: {said}",
            hint="--output and --resume alone go on with the old ones",
        )


def _absolute(run: PretrainRun) -> PretrainRun:
    def place(name: str) -> str:
        return str(Path(name).resolve()) if Path(name).exists() else name

    text, held_out = [*map(place, run.text)], [*map(place, run.held_out_text)]
    return run.model_copy(update={"text": text, "held_out_text": held_out, "output": run.output.resolve()})


def _flat(run: PretrainRun) -> dict[str, object]:
    dumped = run.model_dump(mode="json")
    flat = {f"settings.{name}": value for name, value in dumped.pop("settings").items()} | dumped
    return {name: value for name, value in flat.items() if name not in FREE}

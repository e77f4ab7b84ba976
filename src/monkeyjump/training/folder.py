"""The folder of a run: all that later commands need.

config.yaml       every field of the run, paths made absolute
run.json          versions, seeds, fingerprints of the data, parameters; written before training
data/             encoded training rows, until the run is done
centers.safetensors   where the centers started
metrics.jsonl     a line per log: loss, loss of each task, learning rate, routing statistics
checkpoints/      complete ones only
adapter/          the trained adapter, with a manifest
result.json       written last: the run is done
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.errors import InputError
from monkeyjump.training.config import RunConfig, absolute
from monkeyjump.training.read import read_run, write_run
from monkeyjump.training.signals import Interrupted

CONFIG, FACTS, METRICS, RESULT = "config.yaml", "run.json", "metrics.jsonl", "result.json"
ADAPTER, CHECKPOINTS, CENTERS = "adapter", "checkpoints", "centers.safetensors"
PACKAGES = ("monkeyjump", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
# may change when a run goes on: nothing that is learned depends on them
FREE = {("output", "folder"), ("train", "keep"), ("train", "report_to")}


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def is_done(folder: Path) -> bool:
    return (folder / RESULT).is_file()


def open_run(folder: Path) -> RunConfig:
    """The config of a run's folder, wherever the folder has been moved to. Raises InputError."""
    if not is_run(folder):
        raise InputError(f"{folder}: no {CONFIG} in it: not the folder of a run", hint="`monkeyjump train` makes one")
    config = read_run(folder / CONFIG)
    return config.model_copy(update={"output": config.output.model_copy(update={"folder": folder})})


@contextlib.contextmanager
def made(folder: Path, field: str = "output.folder") -> Iterator[None]:
    """The folder; gone again where bad input or a signal ends the block and it was not there before."""
    first = next((path for path in (*reversed(folder.parents), folder) if not path.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{field}: {folder} cannot be made: {error.strerror}") from error
    try:
        yield
    except (InputError, Interrupted):
        if first is not None:
            shutil.rmtree(first, ignore_errors=True)
        raise


def clear(folder: Path) -> None:
    """Removes what a killed process had begun to write beside its place: all of it has names with a dot."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_same(folder: Path, config: RunConfig) -> None:
    """Refuses to go on with other settings than the run was begun with. Raises InputError naming them."""
    before, now = _flat(open_run(folder)), _flat(absolute(config))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        said = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed[:5])
        raise InputError(
            f"{folder} was begun with other settings: {said}",
            hint="go on with the old ones, or choose another output.folder",
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    return {
        f"{section}.{name}": value
        for section, fields in dumped.items()
        for name, value in fields.items()
        if (section, name) not in FREE
    }


def write_config(folder: Path, config: RunConfig) -> None:
    write_in_one_piece(folder / CONFIG, write_run(absolute(config)))


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """run.json: `facts`, and the versions that they were made with."""
    versions = {name: version(name) for name in PACKAGES}
    write_json(folder / FACTS, {"versions": {"python": platform.python_version(), **versions}, **facts})


def write_json(path: Path, record: dict[str, Any]) -> None:
    write_in_one_piece(path, to_json(record))


def to_json(record: dict[str, Any], indent: int | None = 1) -> str:
    """JSON has no NaN: null instead."""
    return json.dumps(_finite(record), indent=indent)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


class MetricsFile:
    """metrics.jsonl; a resumed run takes off the lines that it is going to write again."""

    def __init__(self, folder: Path, after_step: int) -> None:
        self.path = folder / METRICS
        kept = [line for line in self.lines(folder) if line["step"] <= after_step]
        write_in_one_piece(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    @staticmethod
    def lines(folder: Path) -> list[dict[str, Any]]:
        """All whole lines; a kill may have left half of the last one."""
        path = folder / METRICS
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(record, indent=None) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value

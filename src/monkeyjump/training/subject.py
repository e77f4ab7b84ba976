"""What later commands look at: the folder of a run, of an adapter alone or of a whole model, as `save_pretrained`
writes them.

A run's folder says everything. An adapter's says its method and the name of its base model; which tasks it or a
whole model is asked is for the caller to say.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers.utils import CONFIG_NAME as MODEL_CONFIG

from monkeyjump.tasks.errors import InputError
from monkeyjump.training import folder as files
from monkeyjump.training.config import Data, Model


@dataclass(frozen=True)
class Subject:
    """A trained adapter, or a whole model, with what it is asked.

    folder: where numbers about it go. adapter: its weights; None for a whole model. trained: what it was trained
    on, whose order numbers the tasks; where that is not known, it is `asked`.
    """

    folder: Path
    adapter: Path | None
    model: Model
    trained: Data
    asked: Data

    @property
    def granularity(self) -> str:
        """What its router decides on; `token` where there is none, which is as well."""
        return "token" if self.adapter is None else read_adapter(self.adapter).get("granularity", "token")


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file()


def is_subject(folder: Path) -> bool:
    """Whether `open_subject` takes it: a run, an adapter, or a whole model."""
    return files.is_run(folder) or is_adapter(folder) or (folder / MODEL_CONFIG).is_file()


def open_subject(folder: Path, model: str | None = None, tasks: Sequence[str] = ()) -> Subject:
    """A finished run, an adapter alone, or a whole model.

    Args:
        model: the base model of an adapter alone; None: as its config says.
        tasks: names or YAML files; none: those that the run was trained on.

    Raises:
        InputError: the folder is none of them, the run is not done, or tasks or an adapter's base model are not known.
    """
    if not files.is_run(folder) and is_subject(folder):
        return _alone(folder, model, tasks)
    config = files.open_run(folder)
    if not files.is_done(folder):
        raise InputError(f"{folder}: the run is not done", hint=f"go on with: monkeyjump train {folder} --resume")
    if model is not None:
        raise InputError(f"--model: the run in {folder} has one: {config.model.path}", hint="leave --model out")
    asked = config.data.model_copy(update={"tasks": list(tasks)}) if tasks else config.data
    return Subject(folder, folder / files.ADAPTER, config.model, config.data, asked)


def base_of(folder: Path, model: str | None) -> Model:
    """The base model of an adapter alone. Raises InputError where nobody names it."""
    path = model or read_adapter(folder).get("base_model_name_or_path")
    if not path:
        raise InputError(f"{folder / CONFIG_NAME} names no base model", hint="add --model FOLDER-OR-HUB-ID")
    return Model(path=str(path))


def load_adapter_config(folder: Path) -> PeftConfig:
    """adapter_config.json as PEFT's config, to be trained. Raises InputError."""
    import monkeyjump  # noqa: F401  registers the adapter types with PEFT

    read_adapter(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG_NAME}: {error}", hint="copy it again, or train it anew") from error
    config.inference_mode = False
    return config


def read_adapter(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError where it is damaged."""
    path = folder / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="copy it again, or train it anew") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, found {type(found).__name__}", hint="copy it again")
    return found


def _alone(folder: Path, model: str | None, tasks: Sequence[str]) -> Subject:
    kind = "an adapter" if is_adapter(folder) else "a whole model"
    if not tasks:
        raise InputError(f"{folder} is {kind}, which does not say its tasks", hint="add --tasks NAME-OR-YAML")
    data = Data(tasks=list(tasks))
    if is_adapter(folder):
        return Subject(folder, folder, base_of(folder, model), data, data)
    if model is not None:
        raise InputError(f"--model: {folder} is {kind}, without a base", hint="leave --model out")
    return Subject(folder, None, Model(path=str(folder)), data, data)

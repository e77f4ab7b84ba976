"""Task files: those that come with the package, and a person's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from monkeyjump.tasks import description, origins
from monkeyjump.tasks.description import Task
from monkeyjump.tasks.errors import InputError, near_miss

Group = Literal["demo", "suite", "mamba"]


def catalog(group: Group | None = None) -> dict[str, Path]:
    """Name -> file of the tasks that come with the package: the demo's, the 47 of the paper's suite,
    those that Mamba models are evaluated on, or all."""
    folder = Path(str(files(__package__) / "catalog")) / (group or "")
    return {path.stem: path for path in sorted(folder.rglob("*.yaml"))}


def find_task(name: str) -> Task:
    """A task by its catalog name or the path of its YAML file. Raises InputError."""
    known = catalog()
    if name in known:
        return read_task(known[name])
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return read_task(path)
        raise InputError(f"tasks: no such file: {name}", hint=f"in the catalog: {', '.join(known)}")
    raise InputError(
        f"tasks: unknown task '{name}'",
        hint=near_miss(name, known, "in the catalog") + " (or give the path of a YAML file)",
    )


def read_mapping(path: Path, expected: str, hint: str = "") -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises InputError; `expected` says what the file should have held."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from None
    except Exception as error:  # the YAML parser has an exception family of its own
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected {expected}, found {type(raw).__name__}", hint=hint)
    return raw  # type: ignore[return-value]


def read_task(path: Path) -> Task:
    """Raises InputError naming the file, the field, the value and the remedy, for all wrong fields at once."""
    raw = read_mapping(path, "'field: value' lines")
    try:
        return Task.model_validate(raw, context={"folder": path.parent})
    except ValidationError as error:
        raise _explain(path, error) from None


def _explain(path: Path, error: ValidationError) -> InputError:
    # A misspelt field is unknown and, under its right name, missing: the first says what to do.
    found = sorted(error.errors(include_url=False), key=lambda details: details["type"] == "missing")
    problems = [_one_problem(details) for details in found]
    hints = list(dict.fromkeys(hint for _, hint in problems if hint))
    return InputError(f"{path}: {'; '.join(text for text, _ in problems)}", hint="; ".join(hints))


def _one_problem(details: ErrorDetails) -> tuple[str, str]:
    field = ".".join(str(part) for part in details["loc"]) or "task"
    if details["type"] == "extra_forbidden":
        return f"unknown field '{field}'", near_miss(details["loc"][-1], _known_fields(), "known fields")
    if details["type"] == "missing":
        return f"field '{field}' is missing", "see the catalog tasks for an example"
    text = details["msg"].removeprefix("Value error, ")
    value: Any = details["input"]
    if isinstance(value, dict):
        return f"field '{field}': {text}", ""
    return f"field '{field}' = {value!r}: {text}", ""


def _known_fields() -> set[str]:
    return {field for module in (description, origins) for field in _fields_of(module)}


def _fields_of(module: Any) -> set[str]:
    models = [found for found in vars(module).values() if isinstance(found, type) and issubclass(found, BaseModel)]
    return {field for model in models for field in model.model_fields}

"""What a task is: one YAML file, checked by pydantic, no code.

name: reviews
source: {kind: files, train: reviews.jsonl}     # relative to this file; jsonl, csv, tsv or parquet
columns: {text: sentence, label: stars}         # field of the instruction: column of the file
instruction: "Review: {text}\\nPositive or negative?"
choices: [positive, negative]
labels: {positive: [4, 5], negative: [1, 2]}    # raw values of the label column; or {above: 0.5}
"""

from __future__ import annotations

import string
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from monkeyjump.tasks.errors import InputError, near_miss

Format = Literal["jsonl", "csv", "tsv", "parquet", "text"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PackageSource(Strict):
    """Files inside a pinned Python package (see `packages.py`); train and test rows are drawn from them."""

    kind: Literal["package"]
    package: str
    archive: str | None = Field(default=None, description="pattern of an archive inside the package")
    files: str = Field(description="pattern of the member files")
    format: Literal["tsv", "text"] = Field(description="text: one row a file, columns text and folder")
    header: list[str] = Field(default=[], description="column names of a tsv without a header line")
    undecodable: Literal["strict", "replace"] = Field(default="strict", description="bytes that are not UTF-8")


class HubSource(Strict):
    """A data set on the Hugging Face Hub."""

    kind: Literal["hub"]
    id: str
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = Field(default="validation", description="null: test rows are taken from train")
    revision: str | None = None


class FileSource(Strict):
    """Local files; the suffix tells the format."""

    kind: Literal["files"]
    train: Path
    test: Path | None = Field(default=None, description="null: test rows are taken from train")

    @field_validator("train", "test")
    @classmethod
    def _exists(cls, path: Path | None, info: Any) -> Path | None:
        if path is None:
            return None
        path = (info.context or {}).get("folder", Path()) / path
        if not path.is_file():
            raise ValueError(f"no such file: {path}")
        suffixes = ("jsonl", "csv", "tsv", "parquet")
        if path.suffix.lstrip(".") not in suffixes:
            raise ValueError(f"the suffix must be one of {', '.join(suffixes)}")
        return path


class Band(Strict):
    """An open range of a numeric label."""

    above: float = float("-inf")
    below: float = float("inf")

    @model_validator(mode="after")
    def _bounded(self) -> Band:
        if not self.model_fields_set:
            raise ValueError("give above, below or both")
        return self

    def holds(self, value: float) -> bool:
        return self.above < value < self.below


class Size(Strict):
    """At most so many rows; what a task really has is said before training."""

    train: int = Field(default=48, ge=1)
    test: int = Field(default=60, ge=1)


class Sizes(Strict):
    small: Size = Size()
    full: Size = Size(train=1000, test=400)


class Task(Strict):
    """A closed-choice text task."""

    name: str = Field(pattern=r"^[\w.-]+$")
    family: str = "own"
    source: Annotated[PackageSource | HubSource | FileSource, Field(discriminator="kind")]
    columns: dict[str, str] = Field(description="'label' and each {field} of the instruction: its column")
    instruction: str = Field(description="the user's turn, with {field} where a column goes")
    choices: list[str] = Field(min_length=2, description="the answers, as the model is to say them")
    labels: dict[str, Band | list[bool | int | float | str]] = Field(
        default={},
        description="choice: raw labels, or {above:, below:}; empty: the label is the choice itself",
    )
    metric: Literal["accuracy"] = "accuracy"
    max_text_tokens: int = Field(default=256, ge=1, description="each field is cut to this; the rest never is")
    sizes: Sizes = Sizes()

    @property
    def fields(self) -> list[str]:
        return [field for field in self.columns if field != "label"]

    @field_validator("choices", mode="before")
    @classmethod
    def _words(cls, choices: Any) -> Any:
        if isinstance(choices, list) and any(isinstance(choice, bool) for choice in choices):
            raise ValueError("YAML reads bare yes, no, true and false as truth values: put them in quotes")
        return choices

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if "label" not in self.columns:
            raise ValueError("columns: name the column that holds the label, as in {label: stars}")
        used = {name for _, name, _, _ in string.Formatter().parse(self.instruction) if name is not None}
        if used != set(self.fields):
            raise ValueError(f"instruction uses {sorted(used)} but columns gives {sorted(self.fields)}")
        if len({choice.strip() for choice in self.choices}) < len(self.choices) or "" in self.choices:
            raise ValueError(f"choices: empty or twice the same in {self.choices}")
        if self.labels and set(self.labels) != set(self.choices):
            raise ValueError(f"labels are given for {list(self.labels)}, choices are {self.choices}")
        return self


def catalog() -> dict[str, Path]:
    """Name -> file of the tasks that come with the package."""
    folder = Path(str(files(__package__) / "catalog"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


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


def read_task(path: Path) -> Task:
    """Raises InputError naming the file, the field, the value and the remedy."""
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from None
    except Exception as error:  # the YAML parser has an exception family of its own
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected 'field: value' lines, found {type(raw).__name__}")
    try:
        return Task.model_validate(raw, context={"folder": path.parent})
    except ValidationError as error:
        raise _explain(path, error) from None


def _explain(path: Path, error: ValidationError) -> InputError:
    # A misspelt field is unknown and, under its right name, missing: the first says what to do.
    found = sorted(error.errors(include_url=False), key=lambda details: details["type"] == "missing")
    problems = [_one_problem(details) for details in found]
    hints = [hint for _, hint in problems if hint]
    return InputError(f"{path}: {'; '.join(text for text, _ in problems)}", hint=hints[0] if hints else "")


def _one_problem(details: ErrorDetails) -> tuple[str, str]:
    field = ".".join(str(part) for part in details["loc"]) or "task"
    if details["type"] == "extra_forbidden":
        return f"unknown field '{field}'", near_miss(details["loc"][-1], _known_fields(), "known fields")
    if details["type"] == "missing":
        return f"field '{field}' is missing", "see the catalog tasks for an example"
    text = details["msg"].removeprefix("Value error, ")
    value = details["input"]
    if isinstance(value, dict):
        return f"field '{field}': {text}", ""
    return f"field '{field}' = {value!r}: {text}", ""


def _known_fields() -> set[str]:
    models = (Task, PackageSource, HubSource, FileSource, Band, Size, Sizes)
    return {field for model in models for field in model.model_fields}

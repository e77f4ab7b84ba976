"""What a task is: one YAML file, checked by pydantic, no code.

name: reviews
source: {kind: files, train: reviews.jsonl}     # relative to this file; jsonl, csv, tsv, parquet or a folder
columns: {text: sentence, label: stars}         # field of the instruction: column of the file
instruction: "Review: {text}\\nPositive or negative?"
choices: [positive, negative]
labels: {positive: [4, 5], negative: [1, 2]}    # raw values of the label column; {above: 0.5}; or `index`

The answer is one of `choices` (the same for every row), one of `options` (each row has its own), or free:
`answer: text` or `answer: number`. With neither columns nor instruction, rows have the columns prompt and
answer; with `messages: column` they are chats, whose last turn is the answer. `media` adds images or a video.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from monkeyjump.suggest import did_you_mean
from monkeyjump.tasks.metric_names import KNOWN
from monkeyjump.tasks.origins import FileSource, HubSource, PackageSource, Strict

LETTERS = string.ascii_uppercase
DRAWN = ("choices", "options")  # fields of an instruction that we write, not a column


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


class Options(Strict):
    """Answers that each row brings along; `{options}` in the instruction lists them as A. B. C."""

    columns: list[str] = Field(default=[], description="one column an option")
    column: str | None = Field(default=None, description="or one column that holds them all; a.b looks inside a")
    keys: str | None = Field(default=None, description="column of the names that the label uses, with label: key")
    label: Literal["index", "number", "letter", "text", "key"] = Field(
        default="index", description="what the label is: 0, 1, ..; 1, 2, ..; A, B, ..; the option; one of `keys`"
    )
    say: Literal["letter", "text"] = Field(default="letter", description="what the model is to answer")

    @model_validator(mode="after")
    def _one_way(self) -> Options:
        if bool(self.columns) == bool(self.column):
            raise ValueError("give either columns: [a, b] or column: a")
        if (self.label == "key") != bool(self.keys):
            raise ValueError("label: key and keys: column belong together")
        return self


class Media(Strict):
    """Images or a video before the text. A cell holds a picture, a path, or a list of either."""

    kind: Literal["image", "video"]
    column: str
    folder: str = Field(
        default="", description="folder of paths, inside MONKEYJUMP_MEDIA; else the folder of the rows' file"
    )
    frames: int = Field(default=8, ge=1, description="frames of a video, evenly spaced")
    start: str | None = Field(default=None, description="column of the second at which a clip begins")
    end: str | None = Field(default=None, description="column of the second at which it ends")


class Code(Strict):
    """Columns of what judges an answer that is a program (pass@1): it goes on after the prompt."""

    prompt: str = Field(description="the beginning of the program, verbatim")
    tests: str = Field(description="Python that defines check(candidate)")
    entry: str = Field(description="name of the function that is checked")


class Size(Strict):
    """At most so many rows, null for all; what a task really has is said before training."""

    train: int | None = Field(default=48, ge=1)
    test: int | None = Field(default=60, ge=1)


class Sizes(Strict):
    small: Size = Size()
    full: Size = Size(train=1000, test=400)


class PaperSize(Strict):
    """Rows in Table 12 of the paper; train is null where it gives only a family's total."""

    train: int | None
    test: int


class Task(Strict):
    """A task; the module's docstring has an example."""

    name: str = Field(pattern=r"^[\w.-]+$")
    family: str = "own"
    source: Annotated[PackageSource | HubSource | FileSource, Field(discriminator="kind")]
    columns: dict[str, str] = Field(
        default={}, description="'label' and each {field} of the instruction: its column; a.b looks inside a"
    )
    instruction: str = Field(default="", description="the user's turn, with {field} where a column goes")
    blank: list[str] = Field(default=[], description="fields that may be empty; a row with another empty is dropped")
    joined: list[str] = Field(default=[], description="fields whose cell is a list of texts, or a list of such lists")
    verbatim: bool = Field(
        default=False, description="a model without a chat template sees the instruction alone and goes on writing"
    )
    code: Code | None = Field(default=None, description="the answer is a program, for the metric pass@1")
    tests_only: bool = Field(default=False, description="all rows are test rows, and none is for training")
    messages: str | None = Field(default=None, description="column of a chat: list of {role:, content:}")
    media: Media | None = None
    choices: list[str] = Field(default=[], description="the answers, as the model is to say them")
    options: Options | None = None
    answer: Literal["choice", "text", "number"] = "choice"
    labels: Literal["index"] | dict[str, Band | list[bool | int | float | str]] = Field(
        default={},
        description="choice: raw labels, or {above:, below:}; index: the place in choices, from 0; "
        "empty: the label is the choice itself",
    )
    range: tuple[float, float] | None = Field(default=None, description="of a number")
    decimals: int = Field(default=1, ge=0, description="of a number, as the model is to say it")
    keep: dict[str, list[bool | int | float | str]] = Field(
        default={}, description="column: values; other rows are dropped with a count"
    )
    metric: str = Field(default="accuracy", description=f"one of {', '.join(KNOWN)}")
    also: list[str] = Field(default=[], description="further metrics to report")
    max_text_tokens: int = Field(default=256, ge=1, description="each field is cut to this; the rest never is")
    answer_prefix: str = Field(
        default="", description="said before every answer, in training and in evaluation; never supervised or scored"
    )
    max_answer_tokens: int = Field(default=32, ge=1, description="of a generated answer")
    balanced: bool = Field(default=False, description="as many rows of each choice as the rarest one allows")
    apart: list[str] = Field(
        default=[], description="fields: rows that agree in them are never in both training and test"
    )
    sizes: Sizes = Sizes()
    paper: PaperSize | None = None

    @property
    def fields(self) -> list[str]:
        return [field for field in self.columns if field != "label"]

    @property
    def modality(self) -> str:
        return self.media.kind if self.media else "text"

    @property
    def is_free(self) -> bool:
        """The model writes its answer; nothing lists what it may say."""
        return self.answer != "choice"

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("messages"):
            return {"answer": "text", "metric": "exact_match", **raw}
        if "columns" not in raw and "instruction" not in raw:
            pair = {"columns": {"prompt": "prompt", "label": "answer"}, "instruction": "{prompt}"}
            closed = "choices" in raw or "options" in raw or "answer" in raw
            return {**pair, **({} if closed else {"answer": "text", "metric": "exact_match"}), **raw}
        return raw

    @field_validator("choices", mode="before")
    @classmethod
    def _words(cls, choices: Any) -> Any:
        if isinstance(choices, list) and any(isinstance(choice, bool) for choice in choices):
            raise ValueError("YAML reads bare yes, no, true and false as truth values: put them in quotes")
        return choices

    @field_validator("metric", "also")
    @classmethod
    def _known_metric(cls, given: Any) -> Any:
        for name in [given] if isinstance(given, str) else given:
            if name not in KNOWN:
                raise ValueError(f"unknown metric: {did_you_mean(name, KNOWN)}choose one of {', '.join(KNOWN)}")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if self.messages:
            given = [
                name
                for name in ("columns", "instruction", "choices", "options", "labels", "answer_prefix")
                if getattr(self, name)
            ]
            if given or self.answer != "text":
                raise ValueError(f"messages: a chat brings its own text: leave out {', '.join(given) or 'answer'}")
            return self
        if "label" not in self.columns:
            raise ValueError("columns: name the column that holds the label, as in {label: stars}")
        self._check_instruction()
        self._check_answers()
        return self

    def _check_instruction(self) -> None:
        used = {name for _, name, _, _ in string.Formatter().parse(self.instruction) if name is not None}
        if used - set(DRAWN) != set(self.fields):
            raise ValueError(f"instruction uses {sorted(used)} but columns gives {sorted(self.fields)}")
        for name in DRAWN:
            if name in used and not getattr(self, name):
                raise ValueError(f"instruction uses {{{name}}} but the task gives no {name}")
        for option in ("apart", "blank", "joined"):
            unknown = set(getattr(self, option)) - set(self.fields) - set(DRAWN)
            if unknown:
                raise ValueError(f"{option}: {sorted(unknown)} are no fields of the instruction ({self.fields})")

    def _check_answers(self) -> None:
        programs = "pass@1" in (self.metric, *self.also)
        if programs != bool(self.code) or (programs and self.answer != "text"):
            raise ValueError("metric pass@1, answer: text and code: {prompt:, tests:, entry:} belong together")
        if self.is_free:
            if self.choices or self.options:
                raise ValueError(f"answer: {self.answer} leaves no room for choices or options")
            return
        if bool(self.choices) == bool(self.options):
            raise ValueError("give choices: [a, b], or options: of each row, or answer: text or number")
        if self.options:
            if self.labels or self.balanced:
                raise ValueError("labels and balanced go with choices; with options say options.label")
            return
        if len(self.choices) < 2:
            raise ValueError(f"choices: at least two are needed, found {self.choices}")
        if len({choice.strip() for choice in self.choices}) < len(self.choices) or "" in self.choices:
            raise ValueError(f"choices: empty or twice the same in {self.choices}")
        if isinstance(self.labels, dict) and self.labels and set(self.labels) != set(self.choices):
            raise ValueError(f"labels are given for {list(self.labels)}, choices are {self.choices}")


def base_folder(task: Task) -> Path | None:
    """The folder that relative paths in a local file's rows start from."""
    if not isinstance(task.source, FileSource):
        return None
    return task.source.train if task.source.train.is_dir() else task.source.train.parent

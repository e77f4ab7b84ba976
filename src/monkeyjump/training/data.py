"""The data of a run: tasks loaded, test rows set apart, training rows mixed. A row is encoded when it is asked for.

Nothing here grows with the number of rows but two integers each: raw rows stay on disk (`tasks.sources`).
Before anything long a part of the training rows is encoded, spread evenly over all, so that what is wrong with
many of them is said at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monkeyjump.evaluation.questions import Questions
from monkeyjump.tasks import Blend, Collator, InputError, LoadedTask, Mixing, Prompts, Size, Task, blend, find_task
from monkeyjump.tasks import load_task as load_one
from monkeyjump.tasks.cache import sha256_of
from monkeyjump.tasks.models import load_tokenizer
from monkeyjump.tasks.origins import FileSource, row_files
from monkeyjump.tasks.vision import VisionPrompts, load_processor
from monkeyjump.training.config import Data

MOST_MASKED = 0.05  # share of rows without a supervised token above which the data must be wrong
CHECKED = 2000
Say = Callable[[str], None]


class TrainingSet:
    """The rows of one pass, with their numbers."""

    def __init__(self, mixture: Blend) -> None:
        self.blend = mixture

    def __len__(self) -> int:
        return len(self.blend.train)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.blend.train[int(index)], "row_ids": int(index)}

    @property
    def tasks(self) -> np.ndarray:
        """Task number of each row."""
        return self.blend.train.tasks

    def where(self, index: int) -> str:
        """Task, file and row that a row came from."""
        rows = self.blend.train
        part = rows.parts[int(rows.tasks[index])]
        return f"{part.task.name}: {part.table[int(part.rows[int(rows.rows[index])])].where}"


@dataclass(frozen=True)
class Checked:
    """What was seen of `rows` encoded rows."""

    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    longest_row: int = 0


@dataclass(frozen=True)
class RunData:
    """Everything that training and evaluation read."""

    tasks: list[LoadedTask]
    prompts: Prompts
    train: TrainingSet
    checked: Checked

    @property
    def names(self) -> list[str]:
        return [loaded.task.name for loaded in self.tasks]

    def tests(self) -> list[Questions]:
        """The test rows of each task, as questions."""
        return [Questions(one.task, one.test, self.prompts, number) for number, one in enumerate(self.tasks)]

    def dropped(self, loaded: LoadedTask) -> dict[str, int]:
        """Reason -> rows of a task that were left out."""
        overlap = self.train.blend.overlap[loaded.task.name]
        found = {reason: count for reason, count in loaded.dropped.items() if count}
        return {**found, **({"also a test row, of another task or once texts are cut": overlap} if overlap else {})}

    def fingerprints(self) -> dict[str, str]:
        return {loaded.task.name: fingerprint(loaded) for loaded in self.tasks}


@dataclass(frozen=True)
class RunCollator:
    """The tasks' collator; the numbers of rows and tasks travel with the batch, for the run's own records."""

    inner: Collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inner(rows)
        for name in ("task_ids", "row_ids"):
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def describe(data: Data) -> list[Task]:
    """The tasks of a run. Raises InputError for an unknown name or a wrong file."""
    return [task if isinstance(task, Task) else find_task(task) for task in data.tasks]


def load_tasks(data: Data, say: Say = lambda text: None) -> list[LoadedTask]:
    """Every task, sampled. Raises InputError naming file, row and field."""
    return [load_one(task, _limits(task, data), data.seed, say) for task in describe(data)]


def _limits(task: Task, data: Data) -> Any:
    """A size by name, or one with the run's cap in it."""
    if data.cap is None or data.size not in ("small", "full"):
        return data.size
    size: Size = getattr(task.sizes, data.size)
    return size.model_copy(update={"train": min(data.cap, size.train or data.cap)})


def prompts_for(tasks: Sequence[Task], place: str, max_length: int | None) -> Prompts:
    """For the model's tokenizer, or for its processor where a task has pictures."""
    if any(task.media for task in tasks):
        return VisionPrompts.of(load_processor(place), max_length)
    return Prompts(load_tokenizer(place), max_length)


def prepare(data: Data, place: str, say: Say = lambda text: None, checked: int = CHECKED) -> RunData:
    """Loads and mixes. Raises InputError, with nothing left behind, where rows are wrong."""
    tasks = load_tasks(data, say)
    prompts = prompts_for([loaded.task for loaded in tasks], place, data.max_length)
    train = TrainingSet(blend(tasks, prompts, _mixing(data), data.seed))
    return RunData(tasks, prompts, train, check_rows(train, checked))


def _mixing(data: Data) -> Mixing:
    if data.weights:
        return Mixing(strategy="weights", weights=data.weights)
    if data.temperature is not None:
        return Mixing(strategy="temperature", temperature=data.temperature)
    return Mixing()


def check_rows(train: TrainingSet, most: int) -> Checked:
    """Encodes up to `most` rows, spread evenly. Raises InputError where too many have nothing to learn from."""
    tokens = supervised = longest = longest_row = 0
    masked: list[int] = []
    numbers = np.unique(np.linspace(0, len(train) - 1, min(most, len(train))).astype(int)).tolist()
    for number in numbers:
        row = train[number]
        learned = sum(label >= 0 for label in row["labels"])
        tokens, supervised = tokens + len(row["input_ids"]), supervised + learned
        if len(row["input_ids"]) > longest:
            longest, longest_row = len(row["input_ids"]), number
        if not learned:
            masked.append(number)
    if len(masked) > MOST_MASKED * len(numbers):
        raise InputError(
            f"{train.where(masked[0])}: no supervised token, as in {len(masked)} of {len(numbers)} rows looked at",
            hint="check the answers of the task, and data.max_length",
        )
    return Checked(len(numbers), tokens, supervised, longest, longest_row)


def fingerprint(loaded: LoadedTask) -> str:
    """sha256 of a task's description, its files (or the library's mark of a data set), and the rows drawn."""
    source = loaded.task.source
    digest = hashlib.sha256(loaded.task.model_dump_json(exclude={"source"}).encode())
    if isinstance(source, FileSource):
        for path in [*row_files(source.train), *(row_files(source.test) if source.test else [])]:
            digest.update(sha256_of(path).encode())
    else:
        marks = [source.model_dump_json(), loaded.train.table.data._fingerprint, loaded.test.table.data._fingerprint]
        digest.update(json.dumps(marks[:1] if source.kind == "package" else marks).encode())
    for rows in (loaded.train.rows, loaded.test.rows):
        digest.update(np.ascontiguousarray(rows).tobytes())
    return digest.hexdigest()

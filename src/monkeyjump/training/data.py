"""The data of a run: tasks loaded, test rows set apart, training rows encoded to disk and drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monkeyjump.tasks import Collator, InputError, LoadedTask, Prompts, Task, TestSet, find_task, load_task, mix
from monkeyjump.training.config import Data
from monkeyjump.training.shares import draw_rows, share_out
from monkeyjump.training.token_rows import Facts, TokenRows, rows_are_there, write_rows

MOST_MASKED = 0.05  # share of rows without a supervised token above which the data must be wrong
MASKED, LONG, OVERLAP = "no supervised token", "longer than max_length", "prompt also among the test rows"
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainingSet:
    """The rows of one epoch. `rows` are all that there are, `order` those that the shares draw from them."""

    rows: TokenRows
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[self.order[index]]

    def per_task(self) -> dict[str, int]:
        found = np.bincount(self.rows.tasks[self.order], minlength=len(self.rows.facts.names))
        return dict(zip(self.rows.facts.names, found.tolist()))


@dataclass(frozen=True)
class RunData:
    """Everything that training and evaluation read."""

    tasks: list[LoadedTask]
    tests: list[TestSet]
    train: TrainingSet
    cut: Counter[str]

    @property
    def facts(self) -> Facts:
        return self.train.rows.facts

    def fingerprints(self) -> dict[str, str]:
        """sha256 of the encoded training rows, and of each task's test prompts with their answers."""
        found = {"train": self.facts.sha256}
        for test in self.tests:
            text = json.dumps([test.prompts, test.answers, test.choices], default=str)
            found[f"test/{test.name}"] = hashlib.sha256(text.encode()).hexdigest()
        return found


@dataclass(frozen=True)
class RunCollator:
    """The tasks' collator; the numbers of rows and tasks travel with the batch, for the run's own records."""

    inner: Collator

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        batch = self.inner(rows)
        for name in ("task_ids", "row_ids"):
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def load_tasks(data: Data, say: Say = lambda text: None) -> list[LoadedTask]:
    """Every task, sampled. Raises InputError naming file, row and field."""
    descriptions = [task if isinstance(task, Task) else find_task(task) for task in data.tasks]
    names = [task.name for task in descriptions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"data.tasks: '{twice}' is given twice", hint="each task needs a name of its own")
    return [load_task(task, data.size, data.seed, say) for task in descriptions]


def prepare(
    data: Data,
    tokenizer: Any,
    folder: Path,
    say: Say = lambda text: None,
    advance: Callable[[int], None] = lambda rows: None,
) -> RunData:
    """Test rows in memory, training rows in `folder`, where an earlier run may have left them.

    Raises InputError, with nothing left behind, where rows are wrong.
    """
    tasks = load_tasks(data, say)
    tests = held_out_sets(tasks, tokenizer)
    if not rows_are_there(folder):
        facts = Facts([loaded.task.name for loaded in tasks])
        write_rows(folder, _encoded(tasks, tests, tokenizer, data, facts, advance), facts)
    rows = TokenRows(folder)
    counts = share_out(rows.facts.kept, data)
    order = draw_rows(rows.tasks, rows.facts.names, counts, data.seed)
    return RunData(tasks, tests, TrainingSet(rows, order), Counter(rows.facts.cut))


def held_out_sets(tasks: Sequence[LoadedTask], tokenizer: Any) -> list[TestSet]:
    """The test rows of tasks, encoded."""
    return mix([dataclasses.replace(loaded, train=[]) for loaded in tasks], tokenizer).tests


def _encoded(
    tasks: Sequence[LoadedTask],
    tests: Sequence[TestSet],
    tokenizer: Any,
    data: Data,
    facts: Facts,
    advance: Callable[[int], None],
) -> Iterator[dict[str, Any]]:
    prompts = Prompts(tokenizer)
    held_out = {tuple(prompt) for test in tests for prompt in test.prompts}
    for number, loaded in enumerate(tasks):
        dropped = Counter(loaded.dropped)
        for example in loaded.train:
            row = prompts.encode(loaded.task, number, example)
            reason = _fault(row, held_out, data.max_length)
            if reason is None:
                yield {"input_ids": row["input_ids"], "labels": row["labels"], "task": number, "where": example.where}
            else:
                dropped[reason] += 1
            advance(1)
        facts.dropped[loaded.task.name] = {reason: count for reason, count in dropped.items() if count}
    facts.cut = dict(prompts.cut)
    _check(facts)


def _fault(row: dict[str, Any], held_out: set[tuple[int, ...]], max_length: int) -> str | None:
    start = next((i for i, label in enumerate(row["labels"]) if label >= 0), None)
    if start is None:
        return MASKED
    if len(row["input_ids"]) > max_length:
        return LONG
    return OVERLAP if tuple(row["input_ids"][:start]) in held_out else None


def _check(facts: Facts) -> None:
    for name in facts.names:
        kept, dropped = facts.kept[name], facts.dropped[name]
        masked = dropped.get(MASKED, 0)
        if not kept or masked > MOST_MASKED * (kept + masked):
            counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
            raise InputError(
                f"task {name}: {kept} usable training rows ({counts})",
                hint="check the answers, choices and max_text_tokens of the task, and data.max_length",
            )

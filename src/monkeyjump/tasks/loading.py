"""From raw rows to examples: labels checked, duplicates out, class-balanced train and test, all by seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from monkeyjump.tasks.description import Band, Task
from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.tasks.sources import Row, read_source


@dataclass(frozen=True)
class Example:
    """One usable row: the instruction's fields and the index of the right choice."""

    fields: dict[str, str]
    answer: int
    where: str

    @property
    def key(self) -> str:
        """Two examples with the same key show the model the same text."""
        return "\x1f".join(" ".join(text.casefold().split()) for text in self.fields.values())


@dataclass(frozen=True)
class LoadedTask:
    task: Task
    train: list[Example]
    test: list[Example]
    dropped: Counter[str]


SizeName = Literal["small", "full"]


def load_task(
    task: Task, size: SizeName = "small", seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> LoadedTask:
    """Reads, checks and samples a task. Train and test share no text.

    Raises InputError naming file, row and field.
    """
    raw = read_source(task, say)
    limits = getattr(task.sizes, size)
    dropped: Counter[str] = Counter()
    pool = _unique(_examples(task, raw.train, dropped), dropped)
    draw = random.Random(f"{seed}/{task.name}")
    if raw.test is None:
        test, train = _balanced(task, pool, (limits.test, limits.train), draw)
    else:
        held_pool = _unique(_examples(task, raw.test, dropped), dropped)
        (test,) = _balanced(task, held_pool, (limits.test,), draw)
        held_out = {example.key for example in held_pool}
        kept = [example for example in pool if example.key not in held_out]
        dropped["text also in the test rows"] += len(pool) - len(kept)
        (train,) = _balanced(task, kept, (limits.train,), draw)
    for name, rows in (("test", test), ("train", train)):
        if not rows:
            raise InputError(
                f"task {task.name}: too few usable rows for a balanced {name} sample ({_counts(dropped)})",
                hint="every choice needs at least two rows; check columns, choices and labels of the task",
            )
    return LoadedTask(task, train, test, dropped)


def _examples(task: Task, rows: Sequence[Row], dropped: Counter[str]) -> list[Example]:
    found = []
    for row in rows:
        answer = _answer(task, row)
        fields = {field: str(_cell(task, row, field)).strip() for field in task.fields}
        if answer is None:
            dropped["label outside every band"] += 1
        elif not all(fields.values()):
            dropped["empty text"] += 1
        else:
            found.append(Example(fields, answer, row.where))
    return found


def _cell(task: Task, row: Row, field: str) -> Any:
    column = task.columns[field]
    if column not in row.values:
        raise InputError(
            f"{row.where}: no column '{column}' (columns.{field} of task {task.name})",
            hint=near_miss(column, row.values, "columns there"),
        )
    value = row.values[column]
    if value is None or isinstance(value, dict | list):
        raise InputError(
            f"{row.where}, field '{column}': expected text or a number, found {type(value).__name__}",
            hint=f"correct the row, or columns.{field} of task {task.name}",
        )
    return value


def _answer(task: Task, row: Row) -> int | None:
    """Index of the row's choice; None where the task gives bands and none holds the label."""
    label = _cell(task, row, "label")
    text = str(label).strip()
    if not task.labels:
        if text in task.choices:
            return task.choices.index(text)
        raise _outside(task, row, label, near_miss(text, task.choices, "choices"))
    bands = False
    for index, choice in enumerate(task.choices):
        rule = task.labels[choice]
        if isinstance(rule, Band):
            bands = True
            if rule.holds(_number(task, row, label)):
                return index
        elif text in {str(value) for value in rule}:
            return index
    if bands:
        return None
    listed = [value for rule in task.labels.values() if isinstance(rule, list) for value in rule]
    raise _outside(task, row, label, near_miss(text, listed, "labels of the task"))


def _number(task: Task, row: Row, label: Any) -> float:
    try:
        return float(label)
    except ValueError:
        raise _outside(task, row, label, "a label with {above:, below:} must be a number") from None


def _outside(task: Task, row: Row, label: Any, hint: str) -> InputError:
    column = task.columns["label"]
    return InputError(f"{row.where}, field '{column}': {label!r} is no answer of task {task.name}", hint=hint)


def _unique(examples: list[Example], dropped: Counter[str]) -> list[Example]:
    """The first of each text; a text with two answers goes out altogether, since neither is sure."""
    answers: dict[str, set[int]] = {}
    for example in examples:
        answers.setdefault(example.key, set()).add(example.answer)
    kept, seen = [], set()
    for example in examples:
        if len(answers[example.key]) > 1:
            dropped["same text, different labels"] += 1
        elif example.key in seen:
            dropped["duplicate text"] += 1
        else:
            seen.add(example.key)
            kept.append(example)
    return kept


def _balanced(task: Task, examples: list[Example], sizes: tuple[int, ...], draw: random.Random) -> list[list[Example]]:
    """Disjoint samples of at most these sizes, as many of each choice as the rarest one allows.

    A pool too small for all samples is shared out among them in proportion.
    """
    groups: list[list[Example]] = [[] for _ in task.choices]
    for example in examples:
        groups[example.answer].append(example)
    usable = min(map(len, groups)) * len(groups)
    if usable < sum(sizes):
        shares = [usable * size // sum(sizes) for size in sizes]
        sizes = (*shares[:-1], usable - sum(shares[:-1]))
    samples: list[list[Example]] = [[] for _ in sizes]
    for group in groups:
        draw.shuffle(group)
    for choice, group in enumerate(groups):
        start = 0
        for sample, size in zip(samples, sizes):
            quota = size // len(groups) + (choice < size % len(groups))
            sample += group[start : start + quota]
            start += quota
    for sample in samples:
        draw.shuffle(sample)
    return samples


def _counts(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items() if count) or "none dropped"

"""From a task to its training and test examples: checked, without duplicates, disjoint, drawn by seed.

What is kept is the number of each row; an example is read from disk when it is asked for.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from monkeyjump.tasks.description import Size, Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.examples import Example, read_row
from monkeyjump.tasks.media import read_media
from monkeyjump.tasks.sampling import Survey, sample, split, survey, unique, without_groups
from monkeyjump.tasks.sources import Table, read_source

ALL = Size(train=None, test=None)
TEST_SHARE = 5  # one row in five, where all rows are asked for and none are set aside as test rows

SizeName = Literal["small", "full", "paper", "all"]


class Examples(Sequence[Example]):
    """Examples that are read when asked for: those of a survey, in its order."""

    def __init__(self, task: Task, table: Table, survey: Survey) -> None:
        self.task, self.table, self.survey = task, table, survey

    @property
    def rows(self) -> np.ndarray:
        return self.survey.rows

    def take(self, places: np.ndarray | slice) -> Examples:
        return Examples(self.task, self.table, self.survey.take(places))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(index)
        row = self.table[int(self.rows[index])]
        example = read_row(self.task, row)
        assert isinstance(example, Example)  # the survey has left out all others
        if self.task.media is None:
            return example
        return Example(**{**vars(example), "media": read_media(self.task, self.task.media, row)})

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def digests(self) -> list[str]:
        """One a row: of the pictures as they are stored, where those are in the table."""
        assert self.task.media is not None
        cells = (self.table.stored(int(row), self.task.media.column) for row in self.rows)
        return [hashlib.blake2b(repr(cell).encode(), digest_size=8).hexdigest() for cell in cells]


@dataclass(frozen=True)
class LoadedTask:
    task: Task
    train: Examples
    test: Examples
    dropped: Counter[str]


def load_task(
    task: Task, size: SizeName | Size = "small", seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> LoadedTask:
    """Reads, checks and samples a task. Train and test share no text.

    size: limits, or the name of such: small and full are the task's own, paper those of Table 12, all: none.
    Raises InputError naming file, row and field.
    """
    limits = _limits(task, size)
    raw = read_source(task, say)
    dropped: Counter[str] = Counter()
    draw = np.random.default_rng([seed, int.from_bytes(hashlib.sha256(task.name.encode()).digest()[:8], "little")])
    pool = unique(task, survey(task, raw.train, dropped), dropped)
    if raw.test is None:
        test, train = split(task, pool, _both(limits, len(pool)), draw)
    else:
        held = unique(task, survey(task, raw.test, dropped), dropped)
        test = sample(task, held, limits.test or len(held), draw)
        kept = without_groups(pool, held.groups)
        dropped["text also in the test rows"] += len(pool) - len(kept)
        train = sample(task, kept, limits.train or len(kept), draw)
    _check_sizes(task, {"test": test, "train": train}, dropped)
    loaded = LoadedTask(
        task,
        Examples(task, raw.train, train),
        Examples(task, raw.test or raw.train, test),
        dropped,
    )
    return _without_seen_pictures(loaded)


def _limits(task: Task, size: SizeName | Size) -> Size:
    if isinstance(size, Size):
        return size
    if size == "all":
        return ALL
    if size == "paper":
        if task.paper is None:
            raise InputError(f"task {task.name}: it has no size in the paper", hint="use small, full or all")
        return Size(train=task.paper.train or task.sizes.full.train, test=task.paper.test)
    return getattr(task.sizes, size)


def _both(limits: Size, pool: int) -> tuple[int, int]:
    test = limits.test or max(1, pool // TEST_SHARE)
    return test, limits.train or max(pool - test, 0)


def _check_sizes(task: Task, found: dict[str, Survey], dropped: Counter[str]) -> None:
    for name, rows in found.items():
        if len(rows):
            continue
        kind, hint = ("balanced ", "every choice needs at least two rows; ") if task.balanced else ("", "")
        raise InputError(
            f"task {task.name}: too few usable rows for a {kind}{name} sample ({counts(dropped)})",
            hint=f"{hint}check columns, choices and labels of the task",
        )


def _without_seen_pictures(loaded: LoadedTask) -> LoadedTask:
    """Rows hold their pictures encoded: only the chosen ones are compared, byte for byte, whatever the text."""
    task, train, test = loaded.task, loaded.train, loaded.test
    if task.media is None or not train.table.is_embedded(task.media.column):
        return loaded
    seen = set(test.digests())
    fresh = np.array([digest not in seen for digest in train.digests()], dtype=bool)
    loaded.dropped[f"{task.modality} also in the test rows"] += int((~fresh).sum())
    return LoadedTask(task, train.take(fresh), test, loaded.dropped)


def counts(dropped: Counter[Any]) -> str:
    return ", ".join(f"{count} dropped: {reason}" for reason, count in dropped.items() if count) or "none dropped"

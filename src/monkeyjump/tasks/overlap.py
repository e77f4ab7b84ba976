"""How much of the test rows training has seen: equal texts, and runs of n words in common.

Within a task equal texts are never on both sides (`load_task`), and rows equal to a test row of another task
are left out (`blend`). What remains is text in common: counted here as in GPT-3's report (Brown et al., 2020,
appendix C: n of 13 words), per test row. Only the fields are compared, not the instruction around them.
Tasks with pictures are passed over: their questions repeat by design, and their pictures are compared as such.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from monkeyjump.tasks.examples import Example
from monkeyjump.tasks.loading import LoadedTask

WORDS = 13


@dataclass(frozen=True)
class Overlap:
    """`seen` of `rows` test rows share a run of words with training rows; `by` counts those rows by their task."""

    task: str
    rows: int
    seen: int
    by: Counter[str]


def runs(example: Example, words: int) -> Iterator[int]:
    """A hash of each run of `words` words; a shorter text is one run, if it has at least half as many."""
    for text in example.texts:
        found = re.findall(r"\w+", text.casefold())
        if words // 2 <= len(found) < words:
            yield hash(tuple(found))
        for start in range(len(found) - words + 1):
            yield hash(tuple(found[start : start + words]))


def find_overlap(tasks: Sequence[LoadedTask], words: int = WORDS, most: int | None = None) -> list[Overlap]:
    """One result a text task. `most`: training rows of each task that are looked at; memory holds test runs only."""
    tasks = [loaded for loaded in tasks if loaded.task.media is None]
    wanted: dict[int, list[tuple[int, int]]] = {}
    for number, loaded in enumerate(tasks):
        for row, example in enumerate(loaded.test):
            for run in set(runs(example, words)):
                wanted.setdefault(run, []).append((number, row))
    seen: list[dict[int, set[str]]] = [{} for _ in tasks]
    for loaded in tasks:
        for example in loaded.train[:most]:
            for run in set(runs(example, words)) & wanted.keys():
                for number, row in wanted[run]:
                    seen[number].setdefault(row, set()).add(loaded.task.name)
    return [
        Overlap(loaded.task.name, len(loaded.test), len(rows), Counter(name for by in rows.values() for name in by))
        for loaded, rows in zip(tasks, seen)
    ]

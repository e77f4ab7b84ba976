"""Many tasks as one training set that is encoded row by row, when a row is asked for.

The order is two arrays of integers (task, row of the task), so a million rows cost 16 MB whatever they hold.
Caps are the sizes that tasks are loaded with; here it is decided how often each task comes up:

    concatenate   every row once
    weights       task t with probability w_t / sum w
    temperature   task t with probability n_t^(1/T) / sum n^(1/T): T = 1 by size, large T evenly
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
from pydantic import Field, model_validator

from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.tasks.loading import Examples, LoadedTask
from monkeyjump.tasks.origins import Strict
from monkeyjump.tasks.prompts import Prompts
from monkeyjump.tasks.sampling import Survey


class Mixing(Strict):
    """How often each task comes up in one pass."""

    strategy: Literal["concatenate", "weights", "temperature"] = "concatenate"
    weights: dict[str, float] = Field(default={}, description="task: weight, for all tasks")
    temperature: float = Field(default=1.0, gt=0)
    stop: Literal["first_exhausted", "all_exhausted"] = Field(
        default="all_exhausted", description="a pass ends when the first task runs out, or when all have once"
    )

    @model_validator(mode="after")
    def _fitting(self) -> Mixing:
        if bool(self.weights) != (self.strategy == "weights"):
            raise ValueError("weights and strategy: weights belong together")
        wrong = {name: weight for name, weight in self.weights.items() if not 0 < weight < float("inf")}
        if wrong:
            raise ValueError(f"weights: {wrong} must be above 0; leave a task out of the list of tasks instead")
        return self


class TrainingRows(Sequence[dict[str, Any]]):
    """Encoded rows: input_ids, attention_mask, labels, task, task_ids, and pictures where the task has them."""

    def __init__(self, parts: Sequence[Examples], prompts: Prompts, tasks: np.ndarray, rows: np.ndarray) -> None:
        self.parts, self.prompts, self.tasks, self.rows = parts, prompts, tasks, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> TrainingRows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | TrainingRows:
        if isinstance(index, slice):
            return TrainingRows(self.parts, self.prompts, self.tasks[index], self.rows[index])
        task_id = int(self.tasks[index])
        part = self.parts[task_id]
        return self.prompts.encode(part.task, task_id, part[int(self.rows[index])])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Blend:
    """`rows`: of each task in one pass.

    `overlap`: training rows left out because they are test rows of some task, or of their own once texts are cut.
    """

    train: TrainingRows
    tests: list[Examples]
    rows: Counter[str]
    overlap: Counter[str]


def blend(tasks: Sequence[LoadedTask], prompts: Prompts, mixing: Mixing | None = None, seed: int = 0) -> Blend:
    """Raises InputError where names collide, weights do not fit, or a task would get no row."""
    mixing = mixing or Mixing()
    names = distinct_names(tasks)
    held = np.concatenate([loaded.test.survey.keys for loaded in tasks])
    overlap: Counter[str] = Counter()
    parts = []
    for name, loaded in zip(names, tasks):
        fresh = ~np.isin(loaded.train.survey.keys, held) & ~_equal_when_cut(loaded, prompts)
        overlap[name] = int((~fresh).sum())
        parts.append(loaded.train.take(fresh))
    _check_none_is_empty(names, Counter({name: len(part) for name, part in zip(names, parts)}), overlap)
    order, rows = _order(names, [len(part) for part in parts], mixing, seed)
    counts = Counter({name: int(count) for name, count in zip(names, np.bincount(order, minlength=len(names)))})
    _check_none_is_empty(names, counts, overlap)
    return Blend(TrainingRows(parts, prompts, order, rows), [loaded.test for loaded in tasks], counts, overlap)


def _equal_when_cut(loaded: LoadedTask, prompts: Prompts) -> np.ndarray:
    """Which training rows would be asked exactly as one of the task's test rows: [rows], bool.

    Only rows that begin as a test row does and are long enough to be cut are encoded, so that a million rows are
    not. Tasks with pictures are passed over: the pictures tell their rows apart.
    """
    train, test = loaded.train.survey, loaded.test.survey
    found = np.zeros(len(train), bool)
    if loaded.task.media:
        return found
    silent = replace(prompts, cut=Counter())  # what is cut here is not yet a row of training
    least = _least_cut(loaded, silent)

    def shown(rows: Examples, among: Survey) -> Iterator[tuple[int, int]]:
        for place in np.flatnonzero(np.isin(rows.survey.heads, among.heads) & (rows.survey.sizes >= least)).tolist():
            yield place, hash(tuple(silent.prompt(loaded.task, rows[place])))

    asked = {prompt for _, prompt in shown(loaded.test, train)}
    for place, prompt in shown(loaded.train, test):
        found[place] = prompt in asked
    return found


def _least_cut(loaded: LoadedTask, prompts: Prompts) -> int:
    """Bytes of a row's texts below which it cannot be equal to a row that was cut; no token is less than a byte."""
    example = loaded.test[0]
    if prompts.max_length is None:
        return loaded.task.max_text_tokens
    if example.turns:  # the turns of other rows need not be as many
        return 0
    bare = replace(example, fields=dict.fromkeys(example.fields, ""))
    around = len(replace(prompts, max_length=None).prompt(loaded.task, bare))
    return min(loaded.task.max_text_tokens, max(0, prompts.max_length - around - len(example.fields)))


def _check_none_is_empty(names: list[str], rows: Counter[str], overlap: Counter[str]) -> None:
    for name in names:
        if not rows[name]:
            raise InputError(
                f"task {name} would get no training row ({overlap[name]} left out as test rows)",
                hint="raise its weight or its rows, use stop: all_exhausted, or take it off the list of tasks",
            )


def distinct_names(tasks: Sequence[LoadedTask]) -> list[str]:
    names = [loaded.task.name for loaded in tasks]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"tasks: '{twice[0]}' is given twice", hint="each task needs a name of its own")
    return names


def _order(names: list[str], sizes: list[int], mixing: Mixing, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Task and row of every training row of one pass."""
    import datasets  # one second: only where it is needed

    parts = [
        datasets.Dataset.from_dict({"task": np.full(size, number, np.int64), "row": np.arange(size)})
        for number, size in enumerate(sizes)
    ]
    if mixing.strategy == "concatenate":
        joined = datasets.concatenate_datasets(parts)
    else:
        joined = datasets.interleave_datasets(
            [part.shuffle(seed=seed) for part in parts],
            probabilities=_probabilities(names, sizes, mixing),
            seed=seed,
            stopping_strategy=mixing.stop,
        )
    arrays = joined.with_format("numpy")
    return np.asarray(arrays["task"][:]), np.asarray(arrays["row"][:])


def _probabilities(names: list[str], sizes: list[int], mixing: Mixing) -> list[float]:
    if mixing.strategy == "temperature":
        shares = np.array(sizes, dtype=float) ** (1 / mixing.temperature)
    else:
        for name in mixing.weights:
            if name not in names:
                raise InputError(f"weights: no task '{name}'", hint=near_miss(name, names, "tasks"))
        missing = [name for name in names if name not in mixing.weights]
        if missing:
            raise InputError(f"weights: none is given for {', '.join(missing)}", hint="give every task a weight")
        shares = np.array([mixing.weights[name] for name in names])
    return (shares / shares.sum()).tolist()

"""Several tasks as one training set and one test set per task, in tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from monkeyjump.tasks.blending import distinct_names
from monkeyjump.tasks.examples import Example
from monkeyjump.tasks.loading import LoadedTask
from monkeyjump.tasks.prompts import Prompts, Tokens


@dataclass(frozen=True)
class TestSet:
    """The test rows of one task: prompts, the answers they are scored against, the right one of each."""

    __test__ = False  # not for pytest

    name: str
    examples: Sequence[Example]
    prompts: list[Tokens]
    choices: list[Tokens]
    answers: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Mixture:
    """`train` rows of all tasks, task after task; the trainer shuffles them."""

    train: list[dict[str, Any]]
    tests: list[TestSet]
    cut: Counter[str]
    overlap: Counter[str] = field(default_factory=Counter)


def mix(tasks: Sequence[LoadedTask], tokenizer: Any) -> Mixture:
    """Encodes every task. A training row whose prompt, after cutting, is a test prompt goes out, counted."""
    distinct_names(tasks)
    prompts = Prompts(tokenizer)
    tests = [_test_set(loaded, prompts) for loaded in tasks]
    held_out = {tuple(prompt) for test in tests for prompt in test.prompts}
    mixture = Mixture([], tests, prompts.cut)
    for task_id, loaded in enumerate(tasks):
        for example in loaded.train:
            row = prompts.encode(loaded.task, task_id, example)
            start = next(i for i, label in enumerate(row["labels"]) if label >= 0)
            if tuple(row["input_ids"][:start]) in held_out:
                mixture.overlap[loaded.task.name] += 1
            else:
                mixture.train.append(row)
    return mixture


def _test_set(loaded: LoadedTask, prompts: Prompts) -> TestSet:
    return TestSet(
        loaded.task.name,
        loaded.test,
        [prompts.prompt(loaded.task, example) for example in loaded.test],
        prompts.choices(loaded.task),
        [example.answer for example in loaded.test],
    )

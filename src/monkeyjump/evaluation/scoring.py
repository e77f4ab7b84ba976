"""A model's answers on the test rows of several tasks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from monkeyjump.evaluation.choices import Advance, choice_scores
from monkeyjump.tasks.mixture import TestSet
from monkeyjump.tasks.prompts import Collator

Correct = dict[str, list[bool]]


def evaluate(
    model: Any,
    tests: list[TestSet],
    collator: Collator,
    batch_size: int = 16,
    advance: Advance = lambda tokens: None,
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
) -> Correct:
    """Task name -> for each test row, whether the likeliest choice is the right one.

    `around(task name)` is entered for the forwards of that task, for instance to record its routing.
    """
    training = model.training
    model.eval()
    correct: Correct = {}
    for test in tests:
        with around(test.name):
            scores = choice_scores(model, test.prompts, test.choices, collator, batch_size, advance)
        correct[test.name] = [a == b for a, b in zip(scores.argmax(1).tolist(), test.answers)]
    model.train(training)
    return correct

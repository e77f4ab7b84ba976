"""A model's answers on the test rows of several tasks, by log-likelihood of the choices and by what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from monkeyjump.evaluation.choices import Advance, choice_scores, differ_at_first
from monkeyjump.evaluation.generation import generate_answers
from monkeyjump.evaluation.questions import Questions
from monkeyjump.tasks.prompts import Collator

Correct = dict[str, list[bool]]
CHUNK = 256  # rows whose pictures are in memory at once


@dataclass
class Answers:
    """Of one task's rows. `chosen`: the likeliest choice, empty for free answers; `written`: empty if not asked."""

    name: str
    accepted: list[tuple[str, ...]] = field(default_factory=list)
    right: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    @property
    def correct(self) -> list[bool]:
        return [chosen == right for chosen, right in zip(self.chosen, self.right)]


def answer(
    model: Any,
    tests: Sequence[Questions],
    collator: Collator,
    batch_size: int = 16,
    advance: Advance = lambda tokens: None,
    around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    write: bool = False,
) -> list[Answers]:
    """Answers to all rows; those of tasks with free answers are always written, the others with `write`.

    `around(task name)` is entered for the forwards of that task, for instance to record its routing.
    """
    training = model.training
    model.eval()
    found = []
    for questions in tests:
        answers = Answers(questions.task.name)
        with around(questions.task.name):
            for start in range(0, len(questions), CHUNK):
                _answer(model, questions, range(start, min(start + CHUNK, len(questions))), collator, batch_size,
                        advance, write, answers)  # fmt: skip
        found.append(answers)
    model.train(training)
    return found


def _answer(
    model: Any,
    questions: Questions,
    rows: Sequence[int],
    collator: Collator,
    batch_size: int,
    advance: Advance,
    write: bool,
    answers: Answers,
) -> None:
    asked = [questions[row] for row in rows]
    answers.accepted += [question.gold for question in asked]
    if not questions.task.is_free:
        answers.right += [question.spoken[question.answer] for question in asked]
        scores = choice_scores(model, asked, collator, batch_size, advance)
        answers.chosen += [question.spoken[int(score.argmax())] for question, score in zip(asked, scores)]
    if write or questions.task.is_free:
        tokenizer, most = questions.prompts.tokenizer, questions.task.max_answer_tokens
        answers.written += generate_answers(model, asked, tokenizer, collator, most, batch_size, advance)


def tokens_of(questions: Questions, write: bool = False) -> int:
    """How much `advance` will be told for a task, from a look at up to 64 of its rows."""
    rows = [questions[row] for row in range(0, len(questions), max(1, len(questions) // 64))]
    each = 0
    for question in rows:
        passes = 0 if questions.task.is_free else 1 if differ_at_first(question.choices) else len(question.choices)
        extra = 0 if passes < 2 else sum(len(tokens) - 1 for tokens in question.choices)
        each += question.length * (passes + int(write or questions.task.is_free)) + extra
    return max(1, each * len(questions) // len(rows))

"""What a run scored on each task, with intervals, and row by row against another run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.stats import norm, t

from monkeyjump.evaluation.intervals import Estimate, paired_difference
from monkeyjump.evaluation.metrics import Score, score, whole_difference
from monkeyjump.evaluation.scoring import Answers
from monkeyjump.tasks import InputError, Task

POOLED = "all tasks, pooled"


@dataclass(frozen=True)
class TaskResult:
    """`scores`: metric -> score, of the likeliest choices where answers are closed, else of what was written.

    `written` has the same metrics of the written answers to closed questions, where they were asked for.
    """

    task: str
    family: str
    metric: str
    answers: list[str]
    accepted: list[tuple[str, ...]]
    scores: dict[str, Score]
    written: dict[str, Score] = field(default_factory=dict)
    written_answers: list[str] = field(default_factory=list)

    @property
    def main(self) -> Score:
        return self.scores[self.metric]

    @property
    def rows(self) -> int:
        return len(self.answers)

    @property
    def is_binary(self) -> bool:
        return bool(self.main.rows) and set(self.main.rows) <= {0.0, 1.0}


def result_of(task: Task, answers: Answers) -> TaskResult:
    closed = bool(answers.chosen)
    main = answers.chosen if closed else answers.written
    names = [task.metric, *(name for name in task.also if name != task.metric)]
    both = closed and bool(answers.written)
    written = {name: score(name, answers.written, answers.accepted) for name in names} if both else {}
    return TaskResult(
        task.name,
        task.family,
        task.metric,
        main,
        answers.accepted,
        {name: score(name, main, answers.accepted) for name in names},
        written,
        answers.written if closed else [],
    )


def record_of(result: TaskResult) -> dict[str, Any]:
    """For JSON; `result_from` is the inverse."""
    return asdict(result)


def result_from(record: dict[str, Any]) -> TaskResult:
    scores = {kind: {m: _score_from(one) for m, one in record[kind].items()} for kind in ("scores", "written")}
    return TaskResult(**{**record, **scores, "accepted": [tuple(row) for row in record["accepted"]]})


def _score_from(record: dict[str, Any]) -> Score:
    """JSON has neither tuples nor NaN."""
    numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
    return Score(**{**numbers, "rows": tuple(record["rows"])})


def difference(first: TaskResult, second: TaskResult) -> Estimate:
    """`second` minus `first` on the same rows.

    Agresti-Min for shares, normal for other means, a paired bootstrap for a statistic of all rows together.

    Raises InputError where the rows or the metric differ.
    """
    if first.accepted != second.accepted or first.metric != second.metric:
        raise InputError(
            f"task {first.task}: the two runs were not asked the same rows",
            hint="evaluate both with the same tasks, data.seed and --limit",
        )
    if first.is_binary and second.is_binary:
        return paired_difference([v > 0 for v in first.main.rows], [v > 0 for v in second.main.rows])
    if first.main.rows:
        gaps = np.array(second.main.rows) - np.array(first.main.rows)
        half = norm.ppf(0.975) * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
        return Estimate(gaps.mean(), gaps.mean() - half, gaps.mean() + half)
    return whole_difference(first.metric, first.answers, second.answers, first.accepted)


def pooled_difference(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> Estimate | None:
    """Over the rows of all tasks, where every task's score is a share of right rows."""
    if len(first) < 2 or not all(one.is_binary for one in (*first, *second)):
        return None
    rows = [[value > 0 for one in side for value in one.main.rows] for side in (first, second)]
    return paired_difference(rows[0], rows[1])


def over_seeds(differences: Sequence[float]) -> Estimate:
    """Mean of one difference per seed, with Student's interval; its width is not known for a single seed."""
    values = np.array(differences)
    if len(values) < 2:
        return Estimate(float(values.mean()), float("nan"), float("nan"))
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))

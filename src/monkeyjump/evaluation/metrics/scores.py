"""Metrics by name, each with a standard error and a 95 % interval.

A metric is a registered function from answers and accepted answers to a `Score`. Metrics that are a mean
over rows keep the value of every row, so that two models can be compared row by row. For a share of rows
the interval is Wilson's; for another mean it is the normal one around it, kept inside the metric's range;
for a statistic of all rows together (a correlation, F1 of classes) it is a bootstrap over rows.

    @register("first_letter", "share of answers whose first letter is right")
    def first_letter(answers, accepted):
        return mean_score([a[:1] == right[0][:1] for a, right in zip(answers, accepted)])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, norm

from monkeyjump.evaluation.intervals import accuracy as share
from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.tasks.metric_names import KNOWN

Answers = Sequence[str]
Accepted = Sequence[Sequence[str]]  # of each row, the answers that count as right
RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """`low` and `high` are 95 % limits; `rows` the value of each row, empty where there is none.

    `unread` counts answers that should be numbers and are none: they counted as the mean of the others.
    """

    value: float
    standard_error: float
    low: float
    high: float
    count: int
    rows: tuple[float, ...] = ()
    unread: int = 0


Metric = Callable[[Answers, Accepted], Score]
_METRICS: dict[str, Metric] = {}


def register(name: str, summary: str) -> Callable[[Metric], Metric]:
    """Makes a function available to tasks as `metric: name`."""

    def add(function: Metric) -> Metric:
        KNOWN[name] = summary
        _METRICS[name] = function
        return function

    return add


def known_metrics() -> dict[str, str]:
    """Name -> what it measures. Perplexity is in the list of tasks too, but takes losses, not answers."""
    return {name: KNOWN[name] for name in _METRICS}


def score(name: str, answers: Answers, accepted: Accepted) -> Score:
    """Raises InputError for an unknown metric or no rows, ValueError where lengths differ."""
    if name not in _METRICS:
        raise InputError(f"metric '{name}' is not known", hint=near_miss(name, _METRICS, "metrics"))
    if len(answers) != len(accepted):
        raise ValueError(f"{len(answers)} answers for {len(accepted)} rows")
    if not answers or not all(accepted):
        raise InputError(f"metric {name}: no rows, or a row without an accepted answer", hint="check the test rows")
    return _METRICS[name](answers, accepted)


def mean_score(values: Sequence[float | bool], low: float = 0.0, high: float = 1.0) -> Score:
    """Score of a metric that is a mean over rows, each between `low` and `high`."""
    rows = np.asarray(values, dtype=float)
    value, count = float(rows.mean()), len(rows)
    error = float(rows.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    if set(np.unique(rows)) <= {0.0, 1.0}:
        limits = share(rows.astype(bool).tolist())
        return Score(value, error, limits.low, limits.high, count, tuple(rows.tolist()))
    half = norm.ppf(0.975) * error
    return Score(value, error, max(low, value - half), min(high, value + half), count, tuple(rows.tolist()))


def whole_score(statistic: Callable[..., float], *columns: np.ndarray, unread: int = 0) -> Score:
    """Score of a statistic of all rows together; interval and standard error by a seeded bootstrap."""
    value = float(statistic(*columns))
    if len(columns[0]) < 2 or any(len(np.unique(column)) < 2 for column in columns):
        return Score(value, math.nan, math.nan, math.nan, len(columns[0]), unread=unread)
    found = bootstrap(
        columns,
        lambda *drawn: _finite(statistic(*drawn)),
        paired=True,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    limits = found.confidence_interval
    return Score(
        value, float(found.standard_error), float(limits.low), float(limits.high), len(columns[0]), unread=unread
    )


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else 0.0  # a resample of equal rows has no correlation


def normal_text(text: str) -> str:
    return " ".join(text.casefold().split())

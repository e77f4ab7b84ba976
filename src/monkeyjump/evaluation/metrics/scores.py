"""Metrics by name, each with a standard error and a 95 % interval.

A metric is a registered function from answers and accepted answers to a `Score`. Metrics that are a mean
over rows keep the value of every row, so that two models can be compared row by row. For a share of rows
the interval is Wilson's; for another mean it is the normal one around it, kept inside the metric's range;
for a statistic of all rows together (a correlation, F1 of classes) it is a seeded bootstrap over rows. Such a
metric is registered with `register_whole`, as the function that gives it for any rows drawn; two models are then
compared by drawing the same rows of both.

    @register("first_letter", "share of answers whose first letter is right")
    def first_letter(answers, accepted):
        return mean_score([a[:1] == right[0][:1] for a, right in zip(answers, accepted)])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from monkeyjump.evaluation.intervals import Estimate
from monkeyjump.evaluation.intervals import accuracy as share
from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.tasks.metric_names import KNOWN

Answers = Sequence[str]
Accepted = Sequence[Sequence[str]]  # of each row, the answers that count as right
RESAMPLES = 1000
LIMITS = (0.025, 0.975)


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


@dataclass(frozen=True)
class Statistic:
    """`of`: the metric of the rows with these numbers, repeated as often as they are. `unread`: as in `Score`."""

    of: Callable[[np.ndarray], float]
    unread: int = 0


Metric = Callable[[Answers, Accepted], Score]
Whole = Callable[[Answers, Accepted], Statistic]
_METRICS: dict[str, Metric] = {}
_WHOLE: dict[str, Whole] = {}


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


def register_whole(name: str, summary: str) -> Callable[[Whole], Whole]:
    """Like `register`, for a statistic of all rows together."""

    def add(function: Whole) -> Whole:
        _WHOLE[name] = function
        register(name, summary)(lambda answers, accepted: _whole_score(function(answers, accepted), len(answers)))
        return function

    return add


def _whole_score(statistic: Statistic, count: int) -> Score:
    value = statistic.of(np.arange(count))
    if count < 2:
        return Score(value, math.nan, math.nan, math.nan, count, unread=statistic.unread)
    found = np.array([statistic.of(rows) for rows in _draws(count)])
    low, high = np.quantile(found, LIMITS)
    return Score(value, float(found.std(ddof=1)), float(low), float(high), count, unread=statistic.unread)


def whole_difference(name: str, first: Answers, second: Answers, accepted: Accepted) -> Estimate:
    """`second` minus `first` on the same rows, for a metric of all rows together: a paired percentile bootstrap.

    Raises InputError for a metric that was not registered with `register_whole`.
    """
    if name not in _WHOLE:
        raise InputError(
            f"metric {name}: it has neither a value of each row nor one of drawn rows, so runs cannot be paired",
            hint="return mean_score(...), or use register_whole",
        )
    one, other = (_WHOLE[name](answers, accepted) for answers in (first, second))
    everything = np.arange(len(accepted))
    gap = other.of(everything) - one.of(everything)
    if len(accepted) < 2:
        return Estimate(gap, math.nan, math.nan)
    low, high = np.quantile([other.of(rows) - one.of(rows) for rows in _draws(len(accepted))], LIMITS)
    return Estimate(gap, float(low), float(high))


def _draws(count: int) -> Iterator[np.ndarray]:
    draw = np.random.default_rng(0)
    return (draw.integers(0, count, count) for _ in range(RESAMPLES))


def normal_text(text: str) -> str:
    return " ".join(text.casefold().split())

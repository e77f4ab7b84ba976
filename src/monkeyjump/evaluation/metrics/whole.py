"""Metrics of all rows together: of classes, of numbers, and perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, pearsonr, spearmanr

from monkeyjump.evaluation.metrics.scores import (
    RESAMPLES,
    Accepted,
    Answers,
    Score,
    normal_text,
    register,
    whole_score,
)
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.metric_names import KNOWN

Statistic = Callable[[np.ndarray], np.ndarray]  # [tables, right class, given class] -> [tables]


def _class_score(answers: Answers, accepted: Accepted, statistic: Statistic) -> Score:
    """Score of a statistic of classes, which depends on the table of right and given classes alone.

    A bootstrap over rows is therefore one over the counts of that table. Classes that occur as right answers
    come first in it, and first of all the one that F1 of two classes is about: yes, or the rarest.
    """
    right, given = [normal_text(first[0]) for first in accepted], [normal_text(answer) for answer in answers]
    known = sorted(set(right), key=lambda name: (name != "yes", right.count(name), name))
    number = {name: index for index, name in enumerate([*known, *sorted(set(given) - set(known))])}
    table = np.zeros((len(number), len(number)))
    np.add.at(table, ([number[name] for name in right], [number[name] for name in given]), 1)
    value = float(statistic(table[None])[0])
    total = len(right)
    if total < 2:
        return Score(value, math.nan, math.nan, math.nan, total)
    drawn = np.random.default_rng(0).multinomial(total, table.ravel() / total, size=RESAMPLES)
    found = statistic(drawn.reshape(RESAMPLES, *table.shape).astype(float))
    low, high = np.quantile(found, [0.025, 0.975])
    return Score(value, float(found.std(ddof=1)), float(low), float(high), total)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """0 where nothing is divided by nothing: a class that never occurs, a table of one class."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _f1_of_classes(tables: np.ndarray) -> np.ndarray:
    """-> [tables, classes]: 2 hits / (right + given)."""
    hits = np.diagonal(tables, axis1=1, axis2=2)
    return _ratio(2 * hits, tables.sum(1) + tables.sum(2))


@register("f1_macro", KNOWN["f1_macro"])
def f1_macro(answers: Answers, accepted: Accepted) -> Score:
    classes = len({normal_text(right[0]) for right in accepted})
    return _class_score(answers, accepted, lambda tables: _f1_of_classes(tables)[:, :classes].mean(1))


@register("f1_binary", KNOWN["f1_binary"])
def f1_binary(answers: Answers, accepted: Accepted) -> Score:
    return _class_score(answers, accepted, lambda tables: _f1_of_classes(tables)[:, 0])


@register("matthews", KNOWN["matthews"])
def matthews(answers: Answers, accepted: Accepted) -> Score:
    return _class_score(answers, accepted, _matthews)


def _matthews(tables: np.ndarray) -> np.ndarray:
    """Gorodkin, 2004: the correlation of two classifications into any number of classes."""
    total, hits = tables.sum((1, 2)), np.trace(tables, axis1=1, axis2=2)
    right, given = tables.sum(2), tables.sum(1)
    spread = (total**2 - (right**2).sum(1)) * (total**2 - (given**2).sum(1))
    return _ratio(total * hits - (right * given).sum(1), np.sqrt(spread))


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _numbers(answers: Answers, accepted: Accepted) -> tuple[np.ndarray, np.ndarray, int]:
    """Given and right numbers, and how many answers held none: such a one counts as the mean of the others."""
    found = [_NUMBER.search(answer) for answer in answers]
    given = np.array([float(match.group()) if match else math.nan for match in found])
    unread = int(np.isnan(given).sum())
    given[np.isnan(given)] = 0.0 if unread == len(given) else np.nanmean(given)
    return given, np.array([float(right[0]) for right in accepted]), unread


def _correlation(function: Callable[..., Any], answers: Answers, accepted: Accepted) -> Score:
    given, right, unread = _numbers(answers, accepted)

    def statistic(first: np.ndarray, second: np.ndarray) -> float:
        if len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
            return 0.0  # equal numbers rank nothing
        return function(first, second).statistic

    return whole_score(statistic, given, right, unread=unread)


@register("pearson", KNOWN["pearson"])
def pearson(answers: Answers, accepted: Accepted) -> Score:
    return _correlation(pearsonr, answers, accepted)


@register("spearman", KNOWN["spearman"])
def spearman(answers: Answers, accepted: Accepted) -> Score:
    return _correlation(spearmanr, answers, accepted)


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Score:
    """exp(sum of losses / sum of tokens) from each document's summed negative log-likelihood (nats).

    The interval treats documents as the independent rows (a ratio of means, delta method on the log scale).
    """
    loss, size = np.asarray(losses, dtype=float), np.asarray(tokens, dtype=float)
    if not len(loss) or len(loss) != len(size) or size.min() <= 0:
        raise InputError("metric perplexity: no document, or one without a token", hint="check the test rows")
    mean, count = loss.sum() / size.sum(), len(loss)
    value = math.exp(mean)
    if count < 2:
        return Score(value, math.nan, math.nan, math.nan, count)
    error = float(np.std(loss - mean * size, ddof=1)) * math.sqrt(count) / size.sum()
    half = norm.ppf(0.975) * error
    return Score(value, value * error, math.exp(mean - half), math.exp(mean + half), count)

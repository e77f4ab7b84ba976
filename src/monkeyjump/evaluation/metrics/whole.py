"""Metrics of all rows together: of classes, of numbers, and perplexity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import norm, rankdata

from monkeyjump.evaluation.metrics.scores import Accepted, Answers, Score, Statistic, normal_text, register_whole
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.metric_names import KNOWN

TableStatistic = Callable[[np.ndarray, int], float]  # counts [right class, given class], right classes -> value


def _of_classes(answers: Answers, accepted: Accepted, statistic: TableStatistic) -> Statistic:
    """A statistic of the table of right and given classes.

    Classes that occur as right answers come first in it, and first of all the one that F1 of two classes is about:
    yes, or the rarest.
    """
    right, given = [normal_text(first[0]) for first in accepted], [normal_text(answer) for answer in answers]
    known = sorted(set(right), key=lambda name: (name != "yes", right.count(name), name))
    number = {name: index for index, name in enumerate([*known, *sorted(set(given) - set(known))])}
    size = len(number)
    cells = np.array([number[a] * size + number[b] for a, b in zip(right, given)])

    def of(rows: np.ndarray) -> float:
        table = np.bincount(cells[rows], minlength=size * size).reshape(size, size)
        return statistic(table.astype(float), len(known))

    return Statistic(of)


def _f1_of_classes(table: np.ndarray) -> np.ndarray:
    """-> [classes]: 2 hits / (right + given); 0 for a class that never occurs."""
    hits, all_of_it = 2 * np.diagonal(table), table.sum(0) + table.sum(1)
    return np.divide(hits, all_of_it, out=np.zeros_like(hits), where=all_of_it > 0)


@register_whole("f1_macro", KNOWN["f1_macro"])
def f1_macro(answers: Answers, accepted: Accepted) -> Statistic:
    return _of_classes(answers, accepted, lambda table, right: float(_f1_of_classes(table)[:right].mean()))


@register_whole("f1_binary", KNOWN["f1_binary"])
def f1_binary(answers: Answers, accepted: Accepted) -> Statistic:
    return _of_classes(answers, accepted, lambda table, right: float(_f1_of_classes(table)[0]))


@register_whole("matthews", KNOWN["matthews"])
def matthews(answers: Answers, accepted: Accepted) -> Statistic:
    return _of_classes(answers, accepted, lambda table, right: _matthews(table))


def _matthews(table: np.ndarray) -> float:
    """Gorodkin, 2004: the correlation of two classifications into any number of classes; 0 where one is constant."""
    total, right, given = table.sum(), table.sum(1), table.sum(0)
    spread = (total**2 - (right**2).sum()) * (total**2 - (given**2).sum())
    return float((total * np.trace(table) - (right * given).sum()) / math.sqrt(spread)) if spread > 0 else 0.0


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def _numbers(answers: Answers, accepted: Accepted) -> tuple[np.ndarray, np.ndarray, int]:
    """Given and right numbers, and how many answers held none: such a one counts as the mean of the others."""
    found = [_NUMBER.search(answer) for answer in answers]
    given = np.array([float(match.group()) if match else math.nan for match in found])
    unread = int(np.isnan(given).sum())
    given[np.isnan(given)] = 0.0 if unread == len(given) else np.nanmean(given)
    return given, np.array([float(right[0]) for right in accepted]), unread


def _correlation(scale: Callable[[np.ndarray], np.ndarray], answers: Answers, accepted: Accepted) -> Statistic:
    given, right, unread = _numbers(answers, accepted)

    def of(rows: np.ndarray) -> float:
        first, second = given[rows], right[rows]
        if np.ptp(first) == 0 or np.ptp(second) == 0:
            return 0.0  # equal numbers rank nothing
        return float(np.corrcoef(scale(first), scale(second))[0, 1])

    return Statistic(of, unread)


@register_whole("pearson", KNOWN["pearson"])
def pearson(answers: Answers, accepted: Accepted) -> Statistic:
    return _correlation(np.asarray, answers, accepted)


@register_whole("spearman", KNOWN["spearman"])
def spearman(answers: Answers, accepted: Accepted) -> Statistic:
    return _correlation(rankdata, answers, accepted)


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

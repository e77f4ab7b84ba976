"""95 % intervals for accuracies and for the difference of two accuracies on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, norm


@dataclass(frozen=True)
class Estimate:
    """A value between its 95 % limits, all as shares (0.5 is 50 %)."""

    value: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high


def accuracy(correct: Sequence[bool]) -> Estimate:
    """Share of correct rows with its Wilson interval."""
    test = binomtest(sum(correct), len(correct))
    limits = test.proportion_ci(method="wilson")
    return Estimate(test.statistic, limits.low, limits.high)


def paired_difference(first: Sequence[bool], second: Sequence[bool], level: float = 0.95) -> Estimate:
    """Accuracy of `second` minus that of `first` on the same rows, with the interval of Agresti and Min.

    Agresti and Min (Statistics in Medicine 24, 2005): the Wald interval for matched pairs after adding
    half a pair to each of the four outcomes. Unlike the plain Wald interval and the bootstrap it stays
    honest where the two never disagree: it then has a width instead of claiming a difference of exactly 0.
    """
    assert len(first) == len(second)
    n = len(first)
    gained = sum(b and not a for a, b in zip(first, second))
    lost = sum(a and not b for a, b in zip(first, second))
    plus, minus, total = gained + 0.5, lost + 0.5, n + 2
    center = (plus - minus) / total
    spread = (plus + minus - (plus - minus) ** 2 / total) ** 0.5 / total
    half = norm.ppf((1 + level) / 2) * spread
    return Estimate((gained - lost) / n, max(-1.0, center - half), min(1.0, center + half))

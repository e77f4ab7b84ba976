"""Interleaved rounds, and what they say: medians, quartiles, ratios within a round."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

RESAMPLES, BOOTSTRAP_SEED = 10_000, 0


@dataclass(frozen=True)
class Work:
    """One timed pass: `run(prepare())`, of which only `run` is timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


@dataclass(frozen=True)
class Summary:
    """Median and quartiles, in the unit of the measurements."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of the ratio within a round, and its bootstrap 95 % interval."""

    median: float
    low: float
    high: float


def order_of(round_: int, names: Sequence[str]) -> list[str]:
    """Forward in even rounds, backward in odd ones: no candidate always follows the same other."""
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    warmup: int = 0,
    device: str = "cpu",
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every candidate's pass in each round; `warmup` rounds before them do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.freeze()  # a collection then looks at the garbage of one pass, not at all the libraries
    try:
        for round_ in range(-warmup, rounds):
            for name in order_of(round_, list(works)):
                elapsed = time_once(works[name], device)
                if round_ >= 0:
                    seconds[name].append(elapsed)
            after_round()
    finally:
        gc.unfreeze()
    return seconds


def time_once(work: Work, device: str = "cpu") -> float:
    """Seconds that `work.run` takes; its preparation and the garbage of passes before it are not in them."""
    state = work.prepare()
    gc.collect()
    _wait(device)
    start = time.perf_counter()
    result = work.run(state)
    _wait(device)
    elapsed = time.perf_counter() - start
    del result  # kept until here: freeing what a pass returned is not part of it
    return elapsed


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def summary(values: Sequence[float]) -> Summary:
    """Median and quartiles of one candidate's measurements."""
    lower, median, upper = np.quantile(values, [0.25, 0.5, 0.75])
    return Summary(float(median), float(lower), float(upper))


def ratio(values: Sequence[float], others: Sequence[float]) -> Ratio:
    """`values / others`, round by round."""
    ratios = np.asarray(values, dtype=float) / np.asarray(others, dtype=float)
    found = bootstrap(
        (ratios,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=0.95,
        method="percentile",  # the default divides by a spread that a median's resamples may not have
        random_state=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return Ratio(float(np.median(ratios)), float(found.low), float(found.high))

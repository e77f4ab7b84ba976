"""Runs beside each other: one table per pair, and over seeds where a folder holds several runs of each method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monkeyjump.evaluation.intervals import Estimate
from monkeyjump.evaluation.results import POOLED, TaskResult, difference, over_seeds, pooled_difference
from monkeyjump.tasks import InputError


@dataclass(frozen=True)
class Line:
    """One task, or all pooled. `by_seed`: the difference in each pair of runs."""

    task: str
    metric: str
    rows: int
    first: float
    second: float
    by_seed: list[float]
    difference: Estimate


def compare(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[Line]:
    """`second` minus `first` on the same rows. Raises InputError where those differ."""
    pairs = _pairs(first, second)
    lines = [
        Line(a.task, a.metric, a.rows, a.main.value, b.main.value, [b.main.value - a.main.value], difference(a, b))
        for a, b in pairs
    ]
    pooled = pooled_difference([a for a, _ in pairs], [b for _, b in pairs])
    if pooled is not None:
        rows = sum(a.rows for a, _ in pairs)
        means = [sum(sum(one.main.rows) for one in side) / rows for side in zip(*pairs)]
        lines.append(Line(POOLED, "", rows, means[0], means[1], [pooled.value], pooled))
    return lines


def compare_over_seeds(pairs: Sequence[tuple[Sequence[TaskResult], Sequence[TaskResult]]]) -> list[Line]:
    """One pair of results per seed: means over the seeds, and Student's interval of the mean difference.

    It answers what another seed would give on these test rows; `compare` answers what other rows would give.
    """
    tables = [compare(first, second) for first, second in pairs]
    lines = []
    for same in zip(*tables, strict=True):
        gaps = [line.difference.value for line in same]
        first, second = (sum(getattr(line, side) for line in same) / len(same) for side in ("first", "second"))
        lines.append(Line(same[0].task, same[0].metric, same[0].rows, first, second, gaps, over_seeds(gaps)))
    return lines


def _pairs(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[tuple[TaskResult, TaskResult]]:
    other = {result.task: result for result in second}
    missing = [result.task for result in first if result.task not in other]
    if missing or len(first) != len(second):
        names = ", ".join(missing or sorted(other.keys() - {result.task for result in first}))
        raise InputError(f"{names}: not evaluated in both runs", hint="evaluate both with the same --tasks")
    return [(result, other[result.task]) for result in first]


def as_markdown(lines: Sequence[Line], first: str, second: str) -> str:
    head = f"| task | metric | rows | {first} | {second} | {second} minus {first} (95 % interval) |\n"
    body = "".join(
        f"| {line.task} | {line.metric} | {line.rows} | {100 * line.first:.1f} | {100 * line.second:.1f} | "
        f"{points(line.difference)} |\n"
        for line in lines
    )
    return head + "|---|---|---|---|---|---|\n" + body


def points(estimate: Estimate) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})" + ("" if not estimate.covers_zero else ", not resolved")


def groups_of(folder: Path) -> dict[str, dict[int, Path]]:
    """Method -> seed -> run, of the finished and unfinished runs in a folder of a sweep.

    A run is named `METHOD-seedN`. Raises InputError where none is.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        method, mark, seed = path.name.rpartition("-seed")
        if mark and seed.isdigit() and (path / "config.yaml").is_file():
            found.setdefault(method, {})[int(seed)] = path
    if not found:
        raise InputError(
            f"{folder}: neither a run nor a folder of runs named METHOD-seedN",
            hint="`monkeyjump train RUN.yaml --methods lora,mj-lora --seeds 0,1,2` makes one",
        )
    return found

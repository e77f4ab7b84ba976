"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from monkeyjump.evaluation.comparison import Line
from monkeyjump.evaluation.intervals import Estimate, accuracy, paired_difference
from monkeyjump.evaluation.metrics import Score
from monkeyjump.evaluation.results import POOLED, TaskResult
from monkeyjump.evaluation.routing import Spread
from monkeyjump.evaluation.scoring import Correct


def with_pooled(correct: Correct) -> Correct:
    """Adds a row over the test rows of all tasks, if there is more than one."""
    if len(correct) < 2:
        return correct
    return {**correct, POOLED: [right for rows in correct.values() for right in rows]}


def accuracy_table(results: Mapping[str, Correct], first: str, second: str) -> Table:
    """One row a task; a column per model, and `second` minus `first` on the same rows."""
    table = Table(title="Accuracy on the test rows, % (95 % interval)", title_justify="left")
    table.add_column("task")
    table.add_column("rows", justify="right")
    for name in results:
        table.add_column(name, justify="right")
    table.add_column(f"{second} minus {first}, points", justify="right")
    pooled = {name: with_pooled(correct) for name, correct in results.items()}
    for task, rows in pooled[first].items():
        if task == POOLED:
            table.add_section()
        cells = [_share(accuracy(correct[task])) for correct in pooled.values()]
        difference = paired_difference(rows, pooled[second][task])
        table.add_row(task, str(len(rows)), *cells, _points(difference))
    return table


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%}\n({estimate.low * 100:.0f} to {estimate.high * 100:.0f})".replace("%", "")


def _points(estimate: Estimate) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})" + ("\nnot resolved" if estimate.covers_zero else "")


def score_table(results: Sequence[TaskResult], title: str) -> Table:
    """One row a task: each of its metrics with its interval, and that of the written answers where there are any."""
    table = Table(title=title, title_justify="left")
    for name in ("task", "family", "rows", "metric", "score (95 % interval)", "of written answers"):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for one in results:
        for number, (metric, found) in enumerate(one.scores.items()):
            head = (one.task, one.family, str(one.rows)) if number == 0 else ("", "", "")
            written = one.written.get(metric)
            table.add_row(*head, metric, _score(found), _score(written) if written else "")
    for family, mean in family_means(results).items():
        table.add_row(f"mean of {family}", "", "", "", f"{100 * mean:.1f}", "")
    return table


def score_markdown(results: Sequence[TaskResult]) -> str:
    """`score_table` in Markdown."""
    lines = [
        "| task | family | rows | metric | score (95 % interval) | of written answers |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        for metric, found in one.scores.items():
            written = _score(one.written[metric]) if metric in one.written else ""
            lines.append(f"| {one.task} | {one.family} | {one.rows} | {metric} | {_score(found)} | {written} |")
    lines += [f"| mean of {family} | | | | {100 * mean:.1f} | |" for family, mean in family_means(results).items()]
    return "\n".join(lines)


def family_means(results: Sequence[TaskResult]) -> dict[str, float]:
    """Mean of the tasks' main metrics, for families of more than one task."""
    families: dict[str, list[float]] = {}
    for one in results:
        families.setdefault(one.family, []).append(one.main.value)
    return {family: sum(values) / len(values) for family, values in families.items() if len(values) > 1}


def comparison_table(lines: Sequence[Line], first: str, second: str) -> Table:
    """One row a task, `second` minus `first`; with several seeds each one's difference, too."""
    seeds = max(len(line.by_seed) for line in lines)
    table = Table(title=f"{second} minus {first}, same test rows, points (95 % interval)", title_justify="left")
    for name in ("task", "metric", "rows", first, second, "difference", *(["by seed"] if seeds > 1 else [])):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for line in lines:
        by_seed = [" ".join(f"{100 * gap:+.1f}" for gap in line.by_seed)] if seeds > 1 else []
        numbers = (f"{100 * line.first:.1f}", f"{100 * line.second:.1f}", _points(line.difference))
        table.add_row(line.task, line.metric, str(line.rows), *numbers, *by_seed)
    return table


def _score(found: Score) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def routing_table(spreads: Mapping[str, Spread]) -> Table:
    """One row a task: the share of its tokens that each adapter took, averaged over the blocks."""
    slots = list(dict.fromkeys(slot for spread in spreads.values() for slot in spread.shares))
    table = Table(title="Where the test tokens went, % of each task's choices", title_justify="left")
    table.add_column("task")
    for slot in slots:
        table.add_column(slot.rsplit(".", 1)[-1], justify="right")
    table.add_column("adapters in use\nper block", justify="right")
    for task, spread in spreads.items():
        shares = (f"{spread.shares.get(slot, 0.0) * 100:.1f}" for slot in slots)
        table.add_row(task, *shares, f"{spread.effective:.2f} of {spread.possible:g}")
    return table

"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from monkeyjump.evaluation.intervals import Estimate, accuracy, paired_difference
from monkeyjump.evaluation.routing import Spread
from monkeyjump.evaluation.scoring import Correct

POOLED = "all tasks, pooled"


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

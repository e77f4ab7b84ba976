"""`monkeyjump methods`: which methods there are, what they train and cost, and what of it is proven by tests."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from monkeyjump.cli.screen import Screen
    from monkeyjump.methods import Method

TITLES = {"method": "PEFT methods", "architecture": "architectures", "integration": "integrations"}
COSTS = ("space", "time", "trainable", "router")  # the columns of Table 4
SYMBOLS = (
    "Σ over the adapted projections of a block; i, o: a projection's inputs and outputs; d: width of the block's "
    "states; r: rank; N: experts; E: adapted projections of a block; R: those that Monkey Jump routes; F: those of "
    "the feed-forward; T: tasks; H: attention heads; K: adapters, k: experts that act on a token."
)


def methods(
    routed: Annotated[
        bool, typer.Option("--routed", help="What the tests prove: methods, architectures, integrations.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, also the test files of proofs.")] = False,
) -> None:
    """List the methods with what they train, their parameters as formulas, and how sure their definition is.

    Every name goes to --methods of train and to --candidates of bench; a run's file says it as method.base (and
    method.routed). Below come all PEFT methods that can be routed, and why others cannot.
    """
    from monkeyjump.cli.quiet import quiet
    from monkeyjump.cli.screen import Screen
    from monkeyjump.proven import proven

    quiet()
    if routed:
        found: dict[str, Any] = {title: proven()[kind] for kind, title in TITLES.items()}
    else:
        found = _all_methods()
    if json:
        print(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    elif routed:
        print("\n\n".join(_titled(f"{title} ({len(names)})", list(names)) for title, names in found.items()))
    else:
        _show(found, Screen())


def _all_methods() -> dict[str, Any]:
    from monkeyjump.methods import METHODS
    from monkeyjump.tuner.methods import NOT_ROUTABLE
    from monkeyjump.tuner.registry import routable

    return {
        "methods": {name: _record(row) for name, row in METHODS.items()},
        "routable": routable(),
        "refused": {name.lower(): NOT_ROUTABLE[name] for name in sorted(NOT_ROUTABLE)},
    }


def _record(row: Method) -> dict[str, Any]:
    from dataclasses import asdict

    from monkeyjump.methods.paper import VALUES, on_the_papers_model

    formulas = {"adapters": str(row.adapters), "router": str(row.router)}
    return {**asdict(row), **formulas, "llava_onevision_0_5b": {"parameters": on_the_papers_model(row), **VALUES}}


def _show(found: dict[str, Any], screen: Screen) -> None:
    from monkeyjump.methods.paper import UNREPRODUCIBLE

    rows = found["methods"].values()
    for table in _tables(rows):
        screen.out.print(table)
        screen.say()
    screen.say(SYMBOLS)
    remarks: dict[str, list[str]] = {}
    for row in rows:
        for remark in row["remarks"]:
            remarks.setdefault(remark, []).append(row["name"])
    screen.say("\n" + _titled("Corrected in Table 4", [f"{text} ({', '.join(of)})" for text, of in remarks.items()]))
    screen.say("\n" + _titled("Counts of the paper's Figure 2 that no definition gives", list(UNREPRODUCIBLE)))
    screen.say("\n" + _titled(f"routable ({len(found['routable'])}), by base=", found["routable"]))
    refused = [f"{name}: {reason}" for name, reason in found["refused"].items()]
    screen.say("\n" + _titled(f"refused ({len(refused)})", refused))


def _tables(rows: Collection[dict[str, Any]]) -> Iterator[Table]:
    keys = ("name", "trains", "routing", "losses")
    cells = [[row[key] for key in keys] for row in rows]
    yield _table(f"Methods ({len(rows)})", ("name", "trains", "router", "extra losses"), cells)
    cells = [[row["name"], f"{row['title']}: {row['source']}", row["sure"]] for row in rows]
    yield _table("Where the definitions come from, and how sure they are", ("name", "source", "sure"), cells)
    title = "Trainable parameters of a block; on LLaVA-OneVision-Qwen2-0.5B: q, k, v, o of 24 blocks, r 2, N 4, T 6"
    cells = [[row["name"], row["adapters"], row["router"], *_counts(row)] for row in rows]
    yield _table(title, ("name", "adapters", "router", "on that model", "in Figure 2"), cells)
    cells = [[row["name"], *(_corrected(row, column) for column in COSTS)] for row in rows]
    yield _table("Table 4 of the paper, corrected (what it prints instead)", ("name", *COSTS), cells)


def _counts(row: dict[str, Any]) -> tuple[str, str]:
    ours, printed = row["llava_onevision_0_5b"]["parameters"], row["reported"]
    return f"{ours:,}", "" if printed is None else f"{printed:,}K"


def _corrected(row: dict[str, Any], column: str) -> str:
    ours, printed = row["cost"][column], (row["paper"] or row["cost"])[column]
    return ours if ours == printed else f"{ours} ({printed})"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines or ["none"])])

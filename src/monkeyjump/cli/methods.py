"""`monkeyjump methods`: which PEFT methods can be routed, and what of it is proven by tests."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

import typer

TITLES = {"method": "PEFT methods", "architecture": "architectures", "integration": "integrations"}


def methods(
    routed: Annotated[
        bool, typer.Option("--routed", help="What the tests prove: methods, architectures, integrations.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, with the test files of each proof.")] = False,
) -> None:
    """List the PEFT methods that can be routed and those that cannot; --routed: what is proven."""
    from monkeyjump.proven import proven

    found: dict[str, Any] = {title: proven()[kind] for kind, title in TITLES.items()} if routed else _all_methods()
    if json:
        print(jsonlib.dumps(found, indent=2, ensure_ascii=False))
    elif routed:
        print("\n\n".join(_titled(f"{title} ({len(names)})", list(names)) for title, names in found.items()))
    else:
        refused = [f"{name}: {reason}" for name, reason in found["refused"].items()]
        print(_titled(f"routable ({len(found['routable'])}), by base=", found["routable"]))
        print("\n" + _titled(f"refused ({len(refused)})", refused))


def _all_methods() -> dict[str, Any]:
    from monkeyjump.tuner.methods import NOT_ROUTABLE
    from monkeyjump.tuner.registry import routable

    return {"routable": routable(), "refused": {name.lower(): NOT_ROUTABLE[name] for name in sorted(NOT_ROUTABLE)}}


def _titled(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines or ["none"])])

"""What the test suite proves: PEFT methods, architectures, integrations, each with its test files.

`proven.json` is written from marks in the tests (`make proven`); a test fails where the two differ.
"""

from __future__ import annotations

import json
from pathlib import Path

KINDS = ("architecture", "method", "integration")
PROVEN = Path(__file__).with_name("proven.json")

Registry = dict[str, dict[str, list[str]]]  # kind, name, test files


def proven() -> Registry:
    """The registry of the installed package."""
    return json.loads(PROVEN.read_text(encoding="utf-8"))


def write(registry: Registry, path: Path) -> None:
    """Write a registry, one name a line, so that merges are easy."""
    kinds = []
    for kind, names in registry.items():
        lines = ",\n".join(f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(f)}" for name, f in names.items())
        kinds.append(f'  "{kind}": {{\n{lines}\n  }}' if lines else f'  "{kind}": {{}}')
    path.write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8")

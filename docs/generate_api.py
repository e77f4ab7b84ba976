"""Write docs/api.md from the docstrings of the public names and from the options of the commands.

    python docs/generate_api.py        (make docs)

`text()` is the whole page; a test compares it with the file. Google-style sections become lists.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from peft import PeftConfig
from typer.core import TyperGroup

import monkeyjump
from monkeyjump import compat, moe, ops
from monkeyjump.cli.app import app

PAGE = Path(__file__).with_name("api.md")
HEAD = "# API reference\n\nWritten by `make docs` from the docstrings; edit those, not this page.\n"
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$")
ENTRY = re.compile(r"^    (\*{0,2}\w[\w, ]*): +(.*)$")


class _Bare(str):
    """An annotation that prints without quotes."""

    __repr__ = str.__str__


def signature(call: Any) -> str:
    """The call as a user writes it: names, defaults, and annotations as they stand in the source."""
    found = inspect.signature(call)
    shown = [
        p if p.annotation is p.empty else p.replace(annotation=_Bare(p.annotation)) for p in found.parameters.values()
    ]
    shown = [p for p in shown if p.name not in ("self", "cls")]
    result = found.return_annotation
    returned = result if result is found.empty or inspect.isclass(call) else _Bare(result)
    return str(found.replace(parameters=shown, return_annotation=found.empty if inspect.isclass(call) else returned))


def markdown(doc: str) -> str:
    """A docstring as Markdown: sections become bold words over lists."""
    lines, inside = [], False
    for line in inspect.cleandoc(doc).splitlines():
        if section := SECTION.match(line):
            lines += [f"**{section[1]}**", ""]
            inside = True
        elif inside and (entry := ENTRY.match(line)):
            lines.append(f"* `{entry[1]}`: {entry[2]}")
        elif inside and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            inside = inside and not line
            lines.append(line)
    return "\n".join(lines)


def fields(cls: Any) -> Iterable[str]:
    """The documented fields of a config, as a table."""
    own = [f for f in dataclasses.fields(cls) if "help" in f.metadata and f.name in cls.__annotations__]
    if own:
        yield "| field | type | default | |\n|---|---|---|---|"
    for field in own:
        kind = str(field.type).replace("|", "\\|")
        yield f"| `{field.name}` | `{kind}` | `{field.default!r}` | {field.metadata['help']} |"


def entry(name: str, value: Any) -> Iterable[str]:
    """One public name: how it is called, what it does, its own methods."""
    if value is monkeyjump.PRESETS:
        yield presets()
        return
    config = dataclasses.is_dataclass(value) and issubclass(value, PeftConfig)
    call = name + ("(...)" if config else signature(value))
    yield f"### `{name}`\n\n```python\n{call}\n```\n\n{markdown(value.__doc__)}\n"
    if config and (rows := list(fields(value))):
        yield "\n".join(rows) + "\n"
    for method, found in vars(value).items() if inspect.isclass(value) else ():
        plain = found.__func__ if isinstance(found, classmethod) else found
        if not method.startswith("_") and inspect.isfunction(plain) and plain.__doc__:
            yield f"**`{name}.{method}{signature(plain)}`**\n\n{markdown(plain.__doc__)}\n"


def presets() -> str:
    """The named settings, each with what it changes."""
    rows = ["### `PRESETS`\n", markdown(monkeyjump.PRESETS["recommended"].__doc__ or ""), ""]
    rows += ["| preset | `config` | `center_update` | `initialize_centers` |", "|---|---|---|---|"]
    for name, preset in monkeyjump.PRESETS.items():
        parts = (preset.config, preset.center_update, preset.initialize_centers)
        cells = [", ".join(f"`{key}={value!r}`" for key, value in part.items()) for part in parts]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def command(name: str, found: Any) -> str:
    """One command of the command line with its options."""
    rows = [f"### `monkeyjump {name}`\n", inspect.cleandoc(found.help or ""), ""]
    rows += ["| argument or option | default | |", "|---|---|---|"]
    for option in found.params:
        default = "" if option.default is None else f"`{getattr(option.default, 'value', option.default)}`"
        given = option.param_type_name == "argument"
        flags = [option.metavar or option.name.upper()] if given else [*option.opts, *option.secondary_opts]
        words = " ".join((option.help or "").split()).replace("|", "\\|")
        rows.append(f"| {', '.join(f'`{flag}`' for flag in flags)} | {default} | {words} |")
    return "\n".join(rows) + "\n"


def flat(commands: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """(name, command) of all commands; those of a group by both names."""
    for name, found in commands.items():
        if isinstance(found, TyperGroup):
            yield from flat(found.commands, f"{before}{name} ")
        elif name != "help":
            yield before + name, found


def text() -> str:
    """The whole page."""
    commands = typer.main.get_command(app).commands
    own = {n: v for n, v in vars(compat).items() if getattr(v, "__module__", "") == compat.__name__}
    parts = [HEAD, "## `monkeyjump`\n"]
    parts += [part for name in monkeyjump.__all__ for part in entry(name, getattr(monkeyjump, name))]
    whole = [(module, {name: getattr(module, name) for name in module.__all__}) for module in (moe, ops)]
    for module, names in ((compat, own), *whole):
        parts += [f"## `{module.__name__}`\n", inspect.cleandoc(module.__doc__ or "") + "\n"]
        parts += [part for name, value in names.items() for part in entry(name, value)]
    parts += ["## Command line\n", *(command(name, found) for name, found in flat(commands))]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")

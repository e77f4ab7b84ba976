"""What pydantic found wrong, in sentences for a person: field, value, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from monkeyjump.tasks.errors import near_miss

Location = tuple[int | str, ...]
Names = Callable[[Location], Iterable[str]]


def explain(error: ValidationError, known: Names | Iterable[str]) -> list[tuple[str, str]]:
    """(problem, hint) of each error; an unknown field before the missing one that it was meant to be.

    Args:
        known: the names that could stand at a place.
    """
    names: Names = known if callable(known) else lambda location: known
    found = sorted(error.errors(include_url=False), key=lambda details: details["type"] == "missing")
    return [_one(details, names) for details in found]


def _one(details: ErrorDetails, known: Names) -> tuple[str, str]:
    field, value = ".".join(str(part) for part in details["loc"]), details["input"]
    if details["type"] == "extra_forbidden":
        hint = near_miss(details["loc"][-1], known(details["loc"]), "known")
        return f"unknown field '{field}' = {value!r}", hint
    if details["type"] == "missing":
        return f"field '{field}' is missing", "`monkeyjump train --help` lists the fields"
    text = details["msg"].removeprefix("Value error, ")
    if not field:  # of several fields together, which it names
        return text, ""
    if isinstance(value, dict | list):
        return f"{field}: {text}", ""
    own = f"{details['loc'][-1]}={value!r}"  # where the text begins with the field and its value
    if text.startswith(own):
        return f"{field} = {value!r}{text.removeprefix(own)}", ""
    return f"{field} = {value!r}: {text[0].lower() + text[1:]}", ""

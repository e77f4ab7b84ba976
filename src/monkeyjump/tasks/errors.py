"""The one error for input that a person can correct."""

from __future__ import annotations

from collections.abc import Iterable

from monkeyjump.suggest import did_you_mean


class InputError(ValueError):
    """Bad input: `str(error)` names the field and the value, `error.hint` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def near_miss(value: object, known: Iterable[object], what: str = "known") -> str:
    """A hint for a name that is not among `known`: the nearest one, else the whole list."""
    names = sorted({str(name) for name in known})
    return did_you_mean(value, names).strip() or f"{what}: {', '.join(names) or 'none'}"

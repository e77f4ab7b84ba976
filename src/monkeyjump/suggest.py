"""Near misses for error messages: every refusal of a name says which name was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(value: object, options: Iterable[str]) -> str:
    """`"did you mean 'top_k'? "`, or an empty string where nothing comes close."""
    close = difflib.get_close_matches(str(value), list(options), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(map(repr, close))}? " if close else ""


def check_choice(field: str, value: object, options: Iterable[str]) -> None:
    """Raise `ValueError` naming field, value and the allowed options unless `value` is one of them."""
    options = list(options)
    if value not in options:
        raise ValueError(
            f"{field}={value!r} is not known: {did_you_mean(value, options)}choose one of {', '.join(options)}"
        )


def check_fields(cls: type, given: Mapping[str, object], title: str) -> None:
    """Raise `TypeError` naming the first of the `given` names that is no field of the dataclass `cls`."""
    known = {field.name for field in dataclasses.fields(cls)}
    for name in given:
        if name not in known:
            raise TypeError(  # PEFT recognizes these words and tolerates fields of newer versions
                f"{title.partition('(')[0]} got an unexpected keyword argument {name!r} (value {given[name]!r}): "
                f"{did_you_mean(name, known)}"
                f"{title} has the fields {', '.join(sorted(known))}"
            )

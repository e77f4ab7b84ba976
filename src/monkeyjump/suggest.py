"""Near misses for error messages: every refusal of a name says which name was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

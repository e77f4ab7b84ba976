"""Templates of prompts and answers: text with {column} in it."""

from __future__ import annotations

import string


def columns_of(template: str) -> list[str]:
    """The columns that a template names. Raises ValueError where its braces do not close."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error}; write a literal brace twice") from None

"""Code that a model writes runs only where somebody has said so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from monkeyjump.tasks.errors import InputError

_allowed: ContextVar[bool] = ContextVar("allow_code", default=False)


@contextmanager
def allow_code(allowed: bool = True) -> Iterator[None]:
    """Context: programs written by a model may be run, in the sandbox."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def require_consent(what: str) -> None:
    """Raises InputError outside `allow_code`; `what` runs the code."""
    if not _allowed.get():
        raise InputError(
            f"{what} runs code that the model writes, which is off unless asked for",
            hint="add --allow-code (in Python: with monkeyjump.evaluation.sandbox.allow_code():)",
        )

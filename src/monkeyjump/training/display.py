"""Where long work says what it does; `cli.screen.Screen` is one such place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    def advance(self, steps: int = 1, note: str = "") -> None: ...


class Display(Protocol):
    def note(self, text: str) -> None: ...

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]: ...

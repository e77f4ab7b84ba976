"""Ctrl-C and SIGTERM: in training they end the run after a checkpoint, elsewhere at once; the second always at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Ended by a signal. `str(error)` says how to go on."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Context: catches the two signals.

    Attributes:
        gentle: whether the first signal waits for the end of the step.
        received: the signal that waits, 0 for none.
    """

    def __init__(self, going_on: str) -> None:
        self.going_on, self.gentle, self.received = going_on, False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.gentle and not self.received:
            self.received = number
            return
        raise Interrupted(self.going_on, number)

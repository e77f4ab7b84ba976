"""What a long command shows: progress bars, the time of each phase, the memory used."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 100


class Screen:
    """Results on stdout, progress on stderr; both plain where they are not a terminal."""

    def __init__(self) -> None:
        self.out = Console(highlight=False)
        if not self.out.is_terminal:
            self.out = Console(highlight=False, width=PLAIN_WIDTH)
        self.err = Console(stderr=True, highlight=False)
        self.started = time.perf_counter()
        self.phases: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, text: str = "") -> None:
        # A terminal wraps at words; in a file a sentence stays on its line. Written at once, so that
        # results and progress keep their order where both go to one file.
        self.out.print(text, markup=False, soft_wrap=not self.out.is_terminal)
        self.out.file.flush()

    def note(self, text: str) -> None:
        self.err.print(text, markup=False)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # Without a terminal there is nothing to redraw: `Bar` writes a line at each quarter instead.
        with Progress(*columns, console=self.err, disable=not self.err.is_terminal) as progress:
            yield Bar(self, progress, name, total)

    def summary(self) -> str:
        """Wall time per phase, and the peak memory of this process."""
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.phases.items())
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        return f"Time: {duration(self.elapsed)} ({times})\nPeak memory: {memory:.2f} GiB"


class Bar:
    def __init__(self, screen: Screen, progress: Progress, name: str, total: int) -> None:
        self.screen, self.progress, self.name = screen, progress, name
        self.total, self.done, self.quarter = total, 0, 0
        self.task = progress.add_task(name, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.progress.update(self.task, advance=steps, note=note)
        quarter = 4 * self.done // self.total
        if self.progress.disable and quarter > self.quarter:
            self.screen.note(f"{self.name}: {25 * quarter} %  {note}".rstrip())
        self.quarter = quarter


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

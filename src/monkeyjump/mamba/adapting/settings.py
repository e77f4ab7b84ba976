"""One adapting run as a file: `adapting.yaml` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from monkeyjump.mamba.presets import Adapting
from monkeyjump.mamba.text_runs.settings import TextRun, open_text_run


class AdaptRun(TextRun):
    """`model`, a folder or Hub id, on `text`."""

    file: ClassVar[str] = "adapting.yaml"
    command: ClassVar[str] = "mamba adapt"

    model: str
    settings: Adapting


def open_adapting(folder: Path) -> AdaptRun:
    """The run of a folder, wherever it has been moved to. Raises InputError."""
    return open_text_run(AdaptRun, folder)

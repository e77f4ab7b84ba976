"""One pretraining run as a file: `pretraining.yaml` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from monkeyjump.mamba.presets import Pretraining
from monkeyjump.mamba.text_runs.settings import TextRun, open_text_run


class PretrainRun(TextRun):
    """A model from nothing on `text`."""

    file: ClassVar[str] = "pretraining.yaml"
    command: ClassVar[str] = "mamba pretrain"

    settings: Pretraining


def open_pretraining(folder: Path) -> PretrainRun:
    """The run of a folder, wherever it has been moved to. Raises InputError."""
    return open_text_run(PretrainRun, folder)

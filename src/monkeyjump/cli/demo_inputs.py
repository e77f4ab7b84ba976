"""What the demo works on; everything that can be wrong with what a person gave comes up here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monkeyjump.cli.screen import Screen
from monkeyjump.evaluation import Questions, tokens_of
from monkeyjump.tasks import Collator, InputError, find_task
from monkeyjump.tasks.loading import SizeName
from monkeyjump.tasks.models import check_model
from monkeyjump.training.arguments import total_steps
from monkeyjump.training.config import RunConfig
from monkeyjump.training.data import RunCollator, RunData, load_tasks, prepare
from monkeyjump.training.models import DEMO, place_of
from monkeyjump.training.read import validate


@dataclass(frozen=True)
class DemoOptions:
    model: str | None
    tasks: tuple[str, ...]
    size: SizeName
    output: Path
    seed: int


@dataclass(frozen=True)
class Inputs:
    """What all three models share."""

    config: RunConfig
    base: str
    collate: RunCollator
    data: RunData

    @property
    def steps(self) -> int:
        return total_steps(self.config.train, len(self.data.train))

    @property
    def tests(self) -> list[Questions]:
        return self.data.tests()

    @property
    def test_tokens(self) -> int:
        return sum(map(tokens_of, self.tests))


def gather(options: DemoOptions, screen: Screen) -> Inputs:
    """Raises InputError, before any training."""
    for name in options.tasks:
        find_task(name)  # a misspelt name is told before anything is fetched
    config = validate(_run_of(options), Path(), "demo")
    _check_output(options.output)
    if options.model is not None:
        check_model(options.model)
    load_tasks(config.data, screen.note)  # before a model is fetched
    base = place_of(config.model, screen.note)
    data = prepare(config.data, base, screen.note)
    return Inputs(config, base, RunCollator(Collator.of(data.prompts.tokenizer)), data)


def _run_of(options: DemoOptions) -> dict[str, Any]:
    return {
        "preset": "demo",
        "model": {"path": options.model or DEMO},
        "data": {"tasks": list(options.tasks), "size": options.size, "seed": options.seed},
        "method": {"centers": {"seed": options.seed}},
        "train": {"seed": options.seed},
        "output": {"folder": str(options.output)},
    }


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output: {folder} is not writable", hint="choose another folder")

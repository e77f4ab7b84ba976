"""What the demo works on; everything that can be wrong with what a person gave comes up here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monkeyjump.cli.screen import Screen
from monkeyjump.evaluation.choices import differ_at_first
from monkeyjump.tasks import Collator, InputError, LoadedTask, Mixture, TestSet, find_task, load_task, mix
from monkeyjump.tasks.loading import SizeName
from monkeyjump.tasks.models import check_model, demo_model, load_tokenizer
from monkeyjump.training import TrainSettings


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

    base: str
    tokenizer: Any
    collator: Collator
    tasks: list[LoadedTask]
    mixture: Mixture
    settings: TrainSettings

    @property
    def steps(self) -> int:
        return self.settings.steps(len(self.mixture.train))

    @property
    def test_tokens(self) -> int:
        return sum(test.tokens * _forwards(test) for test in self.mixture.tests)


def gather(options: DemoOptions, screen: Screen) -> Inputs:
    """Raises InputError, before any training."""
    descriptions = [find_task(name) for name in options.tasks]
    _check_output(options.output)
    if options.model is not None:
        check_model(options.model)
    tasks = [load_task(task, options.size, options.seed, screen.note) for task in descriptions]
    base = options.model or str(demo_model(screen.note))
    tokenizer = load_tokenizer(base)
    settings = TrainSettings(seed=options.seed)
    return Inputs(base, tokenizer, Collator.of(tokenizer), tasks, mix(tasks, tokenizer), settings)


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output: {folder} is not writable", hint="choose another folder")


def _forwards(test: TestSet) -> int:
    """Passes over each prompt: one where the first tokens tell the choices apart."""
    return 1 if differ_at_first(test.choices) else len(test.choices)

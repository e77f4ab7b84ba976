"""Test rows as a model is asked them: the prompt, what may be answered, and what counts as right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from monkeyjump.moe.more import TaskTable
from monkeyjump.tasks import Examples, Prompts, Task
from monkeyjump.tasks.prompts import Tokens
from monkeyjump.tuner.model import routing_inputs
from monkeyjump.tuner.router import Router


@dataclass(frozen=True)
class Question:
    """`inputs`: input_ids, and pictures where there are any. `choices`: answers in tokens, empty where free."""

    inputs: dict[str, Any]
    choices: Sequence[Tokens] = ()
    spoken: tuple[str, ...] = ()
    answer: int = -1
    gold: tuple[str, ...] = ()
    task_id: int = 0

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Questions:
    """The test rows of one task, encoded when they are asked for: pictures of a whole test set are many."""

    task: Task
    examples: Examples
    prompts: Prompts
    task_id: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Question:
        example = self.examples[index]
        inputs = self.prompts.inputs(self.task, example)
        inputs.pop("labels")
        choices = self.prompts.choices(self.task, example)
        return Question(inputs, choices, example.spoken, example.answer, example.gold, self.task_id)


def told(model: nn.Module, questions: Sequence[Question]) -> AbstractContextManager[Any]:
    """Context: routers (and MoRE) learn where each prompt ends and which task it is of; nothing for other models."""
    if not any(isinstance(module, Router) for module in model.modules()) and not needs_task_ids(model):
        return nullcontext()
    lengths = torch.tensor([question.length for question in questions])
    ids = torch.tensor([question.task_id for question in questions])
    device = next(model.parameters()).device
    return routing_inputs(model, prompt_lengths=lengths.to(device), task_ids=ids.to(device))


def needs_task_ids(model: nn.Module) -> bool:
    """Whether any router decides by task, or a method has parameters of each (MoRE)."""
    if any(isinstance(module, TaskTable) for module in model.modules()):
        return True
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return any(config.granularity == "task" for router in routers for config in router.configs.values())

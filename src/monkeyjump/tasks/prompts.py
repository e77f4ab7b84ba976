"""From an example to token ids.

    [system, empty] user: instruction with the text filled in   assistant: answer <eos>
    |------------------------ labels -100 --------------------------|-- supervised --|

Text is cut before it goes into the instruction, so neither the instruction nor the answer is ever cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor

from monkeyjump.tasks.description import Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.loading import Example

IGNORED = -100
Tokens = list[int]


@dataclass
class Prompts:
    """Encodes examples for one tokenizer and counts the texts it had to cut."""

    tokenizer: Any
    cut: Counter[str] = field(default_factory=Counter)
    _system: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self._system = self._empty_system() if self.tokenizer.chat_template else []

    def _empty_system(self) -> list[dict[str, str]]:
        """An empty system turn where the template would else put in one of its own (30 tokens a row)."""
        user = [{"role": "user", "content": "a"}]
        empty = [{"role": "system", "content": ""}]
        try:
            shorter = len(self._render(empty + user)) < len(self._render(user))
        except jinja2.TemplateError:  # templates without a system role refuse it
            return []
        return empty if shorter else []

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _ids(self, text: str, special: bool = False) -> Tokens:
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def _shorten(self, task: Task, text: str) -> str:
        tokens = self._ids(text)
        if len(tokens) <= task.max_text_tokens:
            return text
        self.cut[task.name] += 1
        return self.tokenizer.decode(tokens[: task.max_text_tokens], skip_special_tokens=False)

    def prompt(self, task: Task, example: Example) -> Tokens:
        """Everything up to where the answer begins."""
        fields = {name: self._shorten(task, text) for name, text in example.fields.items()}
        content = task.instruction.format(**fields)
        if not self.tokenizer.chat_template:
            return self._ids(f"{content}\nAnswer:", special=True)
        return self._ids(self._render([*self._system, {"role": "user", "content": content}]))

    def choices(self, task: Task) -> list[Tokens]:
        """The answers of the task as they follow a prompt, without the end token."""
        lead = "" if self.tokenizer.chat_template else " "
        return [self._ids(lead + choice) for choice in task.choices]

    def encode(self, task: Task, task_id: int, example: Example) -> dict[str, Any]:
        """A training row: input_ids, attention_mask, labels (lists of one length) and task_ids (int)."""
        prompt = self.prompt(task, example)
        answer = self.choices(task)[example.answer]
        if not answer:
            raise InputError(
                f"{example.where}: answer '{task.choices[example.answer]}' of task {task.name} has no tokens",
                hint="correct `choices` of the task, or the tokenizer",
            )
        answer = [*answer, self.tokenizer.eos_token_id]
        return {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORED] * len(prompt) + answer,
            "task_ids": task_id,
        }


@dataclass(frozen=True)
class Collator:
    """Pads rows to one length. What is padding is told by the mask alone: pad and eos may share an id."""

    pad_id: int
    side: Literal["left", "right"] = "right"
    with_task_ids: bool = False

    @classmethod
    def of(cls, tokenizer: Any, **options: Any) -> Collator:
        pad = tokenizer.pad_token_id
        return cls(pad if pad is not None else tokenizer.eos_token_id, **options)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """-> input_ids, attention_mask and, where the rows have them, labels, each [rows, longest]."""
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: self._pad([row[name] for row in rows], value) for name, value in fill.items() if name in rows[0]}
        if self.with_task_ids:
            batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
        return batch

    def _pad(self, sequences: list[Tokens], value: int) -> Tensor:
        longest = max(map(len, sequences))
        gaps = [[value] * (longest - len(sequence)) for sequence in sequences]
        pairs = zip(gaps, sequences) if self.side == "left" else zip(sequences, gaps)
        return torch.tensor([first + second for first, second in pairs])

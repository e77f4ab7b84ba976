"""From an example to token ids.

    [system, empty] user: instruction with the text filled in   assistant: answer <eos>
    |------------------------ labels -100 --------------------------|-- supervised --|

In a chat of several turns the assistant's earlier turns are supervised too. Text is cut before it goes into
the instruction, so neither the instruction nor the answer is ever cut. A task's `answer_prefix` ("The correct
output is") stands after the assistant's header: it belongs to the prompt, in training as in evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import torch
from torch import Tensor

from monkeyjump.tasks.description import DRAWN, Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.examples import Example
from monkeyjump.tasks.stacking import stack_media

IGNORED = -100
Tokens = list[int]
Turn = dict[str, Any]


@dataclass
class Prompts:
    """Encodes examples for one tokenizer and counts the texts it had to cut.

    max_length: of prompt and answer together; texts are cut further where a row would be longer.
    """

    tokenizer: Any
    max_length: int | None = None
    cut: Counter[str] = field(default_factory=Counter)
    _system: list[Turn] = field(init=False)

    def __post_init__(self) -> None:
        self._system = self._empty_system() if self.template else []

    @property
    def template(self) -> str | None:
        return self.tokenizer.chat_template

    def _empty_system(self) -> list[Turn]:
        """An empty system turn where the template would else put in one of its own (30 tokens a row)."""
        user = [{"role": "user", "content": "a"}]
        empty = [{"role": "system", "content": ""}]
        try:
            shorter = len(self._render(empty + user)) < len(self._render(user))
        except jinja2.TemplateError:  # templates without a system role refuse it
            return []
        return empty if shorter else []

    def _render(self, turns: Sequence[Turn], reply: bool = True) -> str:
        """The template's text; `reply`: up to where the assistant begins to speak."""
        return self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=reply)

    def _ids(self, text: str, special: bool = False) -> Tokens:
        return self.tokenizer(text, add_special_tokens=special).input_ids

    def _shorten(self, task: Task, text: str, limit: int) -> str:
        tokens = self._ids(text)
        if len(tokens) <= limit:
            return text
        self.cut[task.name] += 1
        return self.tokenizer.decode(tokens[:limit], skip_special_tokens=False)

    def turns(self, task: Task, example: Example, limit: int | None = None) -> list[Turn]:
        """The chat up to the answer, texts cut to `limit` tokens (default: the task's)."""
        most = task.max_text_tokens if limit is None else limit
        if example.turns:
            turns: list[Turn] = [
                {**turn, "content": self._shorten(task, turn["content"], most)} for turn in example.turns
            ]
            return turns if turns[0]["role"] == "system" else [*self._system, *turns]
        fields = {
            name: text if name in DRAWN else self._shorten(task, text, most) for name, text in example.fields.items()
        }
        return [*self._system, {"role": "user", "content": task.instruction.format(**fields)}]

    def pieces(self, turns: Sequence[Turn], task: Task) -> list[tuple[str, bool]]:
        """Text up to the answer, as (text, supervised) pieces in order; it ends with the task's answer_prefix."""
        if not self.template:
            return [(plain_prompt(turns, task), False)]
        pieces, done = [], 0
        spoken = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        for number in spoken:
            before, after = self._render(turns[:number]), self._render(turns[: number + 1], reply=False)
            if not after.startswith(before):
                raise InputError(
                    "the chat template writes a turn differently once it is over: earlier turns cannot be supervised",
                    hint="give single exchanges (prompt and answer) or another chat template",
                )
            pieces += [(before[done:], False), (after[len(before) :], True)]
            done = len(after)
        return [*pieces, (with_prefix(self._render(turns)[done:], task.answer_prefix), False)]

    def _encoded(self, pieces: Sequence[tuple[str, bool]], example: Example) -> dict[str, Any]:
        """-> input_ids and labels of the pieces, lists of one length."""
        plain = not self.template
        ids: Tokens = []
        labels: Tokens = []
        for text, supervised in pieces:
            tokens = self._ids(text, special=plain and not ids)
            ids += tokens
            labels += tokens if supervised else [IGNORED] * len(tokens)
        return {"input_ids": ids, "labels": labels}

    def inputs(self, task: Task, example: Example, answer: int = 0) -> dict[str, Any]:
        """Everything up to where the answer, of so many tokens, begins: input_ids, labels, pictures."""
        found = self._encoded(self.pieces(self.turns(task, example), task), example)
        if self.max_length is None:
            return found
        limit = max((len(self._ids(text)) for text in _cuttable(example)), default=0)
        limit = min(limit, task.max_text_tokens)
        while (excess := len(found["input_ids"]) + answer - self.max_length) > 0:
            if limit <= 1:
                raise InputError(
                    f"{example.where}: instruction and answer of task {task.name} need {self.max_length + excess} "
                    f"tokens, max_length is {self.max_length}",
                    hint="raise max_length, or shorten the instruction",
                )
            limit = max(1, limit - max(1, excess // max(1, len(_cuttable(example)))))
            found = self._encoded(self.pieces(self.turns(task, example, limit), task), example)
        return found

    def prompt(self, task: Task, example: Example) -> Tokens:
        """Token ids up to where the answer begins."""
        return self.inputs(task, example)["input_ids"]

    def choices(self, task: Task, example: Example | None = None) -> list[Tokens]:
        """The answers of the task, or of a row with its own, as they follow a prompt, without the end token."""
        spoken = task.choices if example is None else example.spoken
        return [self._answer(task, text) for text in spoken]

    def _answer(self, task: Task, text: str) -> Tokens:
        lead = " " if task.answer_prefix or not (self.template or task.verbatim) else ""
        return self._ids(lead + text)

    def encode(self, task: Task, task_id: int, example: Example) -> dict[str, Any]:
        """A training row: input_ids, attention_mask, labels (lists of one length), task, task_ids, pictures."""
        text = example.gold[0] if example.gold else task.choices[example.answer]
        answer = self._answer(task, text)
        if not answer:
            raise InputError(
                f"{example.where}: answer '{text}' of task {task.name} has no tokens",
                hint="correct `choices` of the task, or the tokenizer",
            )
        answer = [*answer, self.tokenizer.eos_token_id]
        inputs = self.inputs(task, example, len(answer))
        length = len(inputs["input_ids"]) + len(answer)
        return {
            **inputs,
            "input_ids": inputs["input_ids"] + answer,
            "attention_mask": [1] * length,
            "labels": inputs["labels"] + answer,
            "task": task.name,
            "task_ids": task_id,
        }


def with_prefix(text: str, prefix: str) -> str:
    """`prefix` after a text that may or may not end with a blank."""
    if not prefix:
        return text
    return f"{text}{prefix}" if text[-1:].isspace() else f"{text} {prefix}"


def plain_prompt(turns: Sequence[Turn], task: Task) -> str:
    """What a model without a chat template reads before the answer."""
    text = plain_text(turns)
    return with_prefix(text if task.verbatim else f"{text}\nAnswer:", task.answer_prefix)


def plain_text(turns: Sequence[Turn]) -> str:
    """A chat for a model without a template: the turns one under the other."""
    return "\n".join(turn["content"] for turn in turns if turn["content"])


def _cuttable(example: Example) -> list[str]:
    return [text for name, text in example.fields.items() if name not in DRAWN] + [
        turn["content"] for turn in example.turns
    ]


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
        """-> input_ids, attention_mask and, where the rows have them, labels, each [rows, longest]; pictures."""
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {name: self._pad([row[name] for row in rows], value) for name, value in fill.items() if name in rows[0]}
        if self.with_task_ids:
            batch["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
        return batch | stack_media(rows)

    def _pad(self, sequences: list[Tokens], value: int) -> Tensor:
        longest = max(map(len, sequences))
        gaps = [[value] * (longest - len(sequence)) for sequence in sequences]
        pairs = zip(gaps, sequences) if self.side == "left" else zip(sequences, gaps)
        return torch.tensor([first + second for first, second in pairs])

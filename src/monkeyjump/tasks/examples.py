"""From a raw row to an example: the text of the prompt, what may be answered, and what is right."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from monkeyjump.tasks.description import LETTERS, Band, Options, Task
from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.tasks.lines import Row

NO_ANSWER = "no answer"
ROLES = ("system", "user", "assistant")
Turn = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One usable row.

    fields: of the instruction. answer: index of the right one of `spoken`, -1 where answers are free.
    spoken: all the row may be answered with, as the model is to say it; empty where answers are free.
    gold: accepted answers, the one to train on first. turns: a chat before its answer, instead of fields.
    media: pictures, or the frames of one video.
    """

    fields: dict[str, str]
    answer: int = -1
    where: str = ""
    spoken: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    media: tuple[Any, ...] = field(default=(), compare=False)

    @property
    def texts(self) -> list[str]:
        """What the model is shown, the instruction around it left out."""
        return [*self.fields.values(), *(turn["content"] for turn in self.turns)]

    @property
    def key(self) -> str:
        """Two examples with the same key show the model the same text."""
        return join_key(self.texts)

    def is_right(self, text: str) -> bool:
        """`text` is the right one of the answers that are open to the row."""
        return text in self.gold and (not self.spoken or self.spoken[self.answer] == text)


def plain(value: Any) -> str:
    """A label as text, the same from JSON, CSV and parquet: true and True, 1 and 1.0 are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return text.lower() if text in ("True", "False") else text


def join_key(texts: list[str]) -> str:
    return "\x1f".join(" ".join(text.casefold().split()) for text in texts)


def read_row(task: Task, row: Row) -> Example | str:
    """The example, without its media, or the reason why the row is left out.

    Raises InputError naming file, row and field where the row does not fit the task.
    """
    for column, values in task.keep.items():
        found = _value(task, row, column, f"keep.{column}")
        if plain(found) not in {plain(value) for value in values}:
            return f"{column} is none of {', '.join(map(str, values))}"
    if task.messages:
        return _chat(task, row, task.messages)
    fields = {name: str(_scalar(task, row, name)).strip() for name in task.fields}
    if not all(text or name in task.blank for name, text in fields.items()):
        return "empty text"
    if task.is_free:
        gold = _accepted(task, row)
        return Example(fields, where=row.where, gold=gold) if gold else NO_ANSWER
    if task.options:
        return _with_options(task, row, task.options, fields)
    answer = _choice(task, row)
    if answer is None:
        return "label outside every band"
    if "{choices}" in task.instruction:
        fields["choices"] = ", ".join(task.choices)
    return Example(fields, answer, row.where, tuple(task.choices), (task.choices[answer],))


def _value(task: Task, row: Row, column: str, field: str) -> Any:
    """A cell; `a.b` is b inside a where no column has that name."""
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(
                f"{row.where}: no column '{column}' ({field} of task {task.name})",
                hint=near_miss(column, row.values, "columns there"),
            )
        value = value[part]
    return value


def _scalar(task: Task, row: Row, field: str) -> Any:
    column = task.columns[field]
    value = _value(task, row, column, f"columns.{field}")
    if value is None or isinstance(value, dict | list):
        raise _wrong_type(task, row, column, "text or a number", value, f"columns.{field}")
    return value


def _wrong_type(task: Task, row: Row, column: str, expected: str, value: Any, field: str) -> InputError:
    return InputError(
        f"{row.where}, field '{column}': expected {expected}, found {type(value).__name__}",
        hint=f"correct the row, or {field} of task {task.name}",
    )


def _outside(task: Task, row: Row, label: Any, hint: str) -> InputError:
    column = task.columns["label"]
    return InputError(f"{row.where}, field '{column}': {label!r} is no answer of task {task.name}", hint=hint)


def _choice(task: Task, row: Row) -> int | None:
    """Index of the row's choice; None where the task gives bands and none holds the label."""
    label = _scalar(task, row, "label")
    text = plain(label)
    if task.labels == "index":
        return _place(task, row, label, len(task.choices), 0)
    if not task.labels:
        if text in task.choices:
            return task.choices.index(text)
        raise _outside(task, row, label, near_miss(text, task.choices, "choices"))
    bands = False
    for index, choice in enumerate(task.choices):
        rule = task.labels[choice]
        if isinstance(rule, Band):
            bands = True
            if rule.holds(_number(task, row, label)):
                return index
        elif text in {plain(value) for value in rule}:
            return index
    if bands:
        return None
    listed = [value for rule in task.labels.values() if isinstance(rule, list) for value in rule]
    raise _outside(task, row, label, near_miss(text, listed, "labels of the task"))


def _number(task: Task, row: Row, label: Any) -> float:
    try:
        value = float(label)
    except (TypeError, ValueError):
        raise _outside(task, row, label, "here a label must be a number") from None
    if not math.isfinite(value):
        raise _outside(task, row, label, "a label must be finite")
    return value


def _place(task: Task, row: Row, label: Any, count: int, first: int) -> int:
    value = _number(task, row, label)
    if value != int(value) or not first <= value < first + count:
        raise _outside(task, row, label, f"a whole number from {first} to {first + count - 1}")
    return int(value) - first


def _texts(task: Task, row: Row, column: str, field: str) -> list[str]:
    value = _value(task, row, column, field)
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise _wrong_type(task, row, column, "a list of texts", value, field)
    return [str(item).strip() for item in value]


def _with_options(task: Task, row: Row, options: Options, fields: dict[str, str]) -> Example | str:
    if options.column:
        texts = _texts(task, row, options.column, "options.column")
    else:
        texts = [str(_value(task, row, column, "options.columns")).strip() for column in options.columns]
    if not 2 <= len(texts) <= len(LETTERS):
        raise InputError(
            f"{row.where}, field '{options.column}': {len(texts)} options", hint=f"from 2 to {len(LETTERS)} are usable"
        )
    answer = _right_option(task, row, options, texts)
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts))
    spoken = tuple(LETTERS[: len(texts)]) if options.say == "letter" else tuple(texts)
    if len(set(spoken)) < len(spoken):
        return "two options with the same text"
    return Example({**fields, "options": listed}, answer, row.where, spoken, (spoken[answer],))


def _right_option(task: Task, row: Row, options: Options, texts: list[str]) -> int:
    label = _scalar(task, row, "label")
    if options.label in ("index", "number"):
        return _place(task, row, label, len(texts), int(options.label == "number"))
    names = {
        "letter": list(LETTERS[: len(texts)]),
        "text": texts,
        "key": _texts(task, row, options.keys, "options.keys") if options.keys else [],
    }[options.label]
    text = plain(label)
    if text not in names:
        raise _outside(task, row, label, near_miss(text, names, "options of the row"))
    return names.index(text)


def _accepted(task: Task, row: Row) -> tuple[str, ...]:
    """Accepted free answers, the most frequent first; empty where the row has none."""
    column = task.columns["label"]
    value = _value(task, row, column, "columns.label")
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list):  # VQA's own files: [{answer:, answer_confidence:}, ...]
        items = [item["answer"] if isinstance(item, dict) and "answer" in item else item for item in items]
    if not all(item is None or isinstance(item, str | int | float) for item in items):
        raise _wrong_type(task, row, column, "text, a number or a list of them", value, "columns.label")
    if task.answer == "number":
        numbers = [_in_range(task, row, item) for item in items if item is not None]
        return tuple(f"{number:.{task.decimals}f}" for number in numbers)
    texts = [str(item).strip() for item in items if item is not None and str(item).strip()]
    return tuple(sorted(texts, key=lambda text: -texts.count(text)))


def _in_range(task: Task, row: Row, label: Any) -> float:
    value = _number(task, row, label)
    if task.range and not task.range[0] <= value <= task.range[1]:
        raise _outside(task, row, label, f"a number from {task.range[0]:g} to {task.range[1]:g}")
    return value


def _chat(task: Task, row: Row, column: str) -> Example | str:
    turns = _value(task, row, column, "messages")
    if not isinstance(turns, list):
        raise _wrong_type(task, row, column, "a list of turns", turns, "messages")
    for number, turn in enumerate(turns):
        place = f"{column}[{number}]"
        if not isinstance(turn, dict):
            raise _wrong_type(task, row, place, '{"role":, "content":}', turn, "messages")
        if turn.get("role") not in ROLES:
            raise InputError(
                f"{row.where}, field '{place}.role': {turn.get('role')!r} is no role",
                hint=near_miss(turn.get("role"), ROLES, "roles"),
            )
        if not isinstance(turn.get("content"), str):
            raise _wrong_type(task, row, f"{place}.content", "text", turn.get("content"), "messages")
    if len(turns) < 2 or turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        return NO_ANSWER
    before = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns[:-1])
    return Example({}, where=row.where, gold=(turns[-1]["content"].strip(),), turns=before)

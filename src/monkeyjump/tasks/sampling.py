"""Which rows of a table are used: one pass, then arrays of integers; a million rows take some 40 MB.

key: what the model is shown. answer: what is right. group: what must not be on both sides of the split
(the key, unless the task says `apart`). head: how its texts begin; rows that differ in it still differ after
their texts are cut. All four are 64-bit hashes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from monkeyjump.tasks.description import DRAWN, Options, Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.examples import NO_ANSWER, Example, join_key, read_row
from monkeyjump.tasks.lines import Row
from monkeyjump.tasks.sources import Table

HEAD = 32  # characters; a token is one at least, but for the bytes of rare characters
MOST_WITHOUT_ANSWER = 0.05  # share of rows without an answer above which the columns must be wrong

Ints = np.ndarray


@dataclass(frozen=True)
class Survey:
    """Of each usable row: its place in the table, key, head, bytes of its texts, group, answer, and choice (-1 without
    fixed choices).
    """

    rows: Ints
    keys: Ints
    heads: Ints
    sizes: Ints
    groups: Ints
    answers: Ints
    choices: Ints

    def take(self, places: Ints | slice) -> Survey:
        return Survey(**{name: values[places] for name, values in vars(self).items()})

    def __len__(self) -> int:
        return len(self.rows)


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def columns_used(task: Task) -> set[str]:
    """Every column that is needed to check a row, pictures aside."""
    options = task.options or Options(column="-")
    extra = [task.messages, options.column, options.keys, *options.columns]
    named = {*task.columns.values(), *task.keep, *(name for name in extra if name)}
    return named | {name.split(".")[0] for name in named}


def survey(task: Task, table: Table, dropped: Counter[str]) -> Survey:
    """Reads every row of the table once. Raises InputError for a row that does not fit the task."""
    found: dict[str, array[int]] = {
        name: array("Q") for name in ("rows", "keys", "heads", "sizes", "groups", "answers")
    }
    choices: array[int] = array("i")
    has_media = task.media is not None
    embedded = task.media is not None and table.is_embedded(task.media.column)
    present = _present(task, table) if embedded else None
    columns = columns_used(task) | ({task.media.column} if task.media and not embedded else set())
    without, head = 0, min(HEAD, task.max_text_tokens)
    for index, row in enumerate(table.scan(columns)):
        example = read_row(task, row)
        if isinstance(example, str):
            dropped[example] += 1
            without += example == NO_ANSWER
            continue
        place = ""
        if has_media:
            seen = present[index] if present is not None else _path(task, row)
            if not seen:
                dropped[f"no {task.modality}"] += 1
                continue
            place = f"\x1f{table.origin}#{index}" if embedded else f"\x1f{seen}"
        key = hash64(example.key + place)
        found["rows"].append(index)
        found["keys"].append(key)
        found["heads"].append(hash64(join_key([text[:head] for text in example.texts])))
        found["sizes"].append(sum(len(text.encode("utf-8", "surrogatepass")) for text in example.texts))
        found["groups"].append(_group(task, example, key))
        found["answers"].append(hash64("\x1f".join(example.gold)))
        choices.append(example.answer if task.choices else -1)
    _check_answers(task, table, without, len(choices))
    arrays = {name: np.frombuffer(values, dtype=np.uint64).copy() for name, values in found.items()}
    arrays["rows"] = arrays["rows"].astype(np.int64)
    return Survey(**arrays, choices=np.array(choices, dtype=np.int32))


def _present(task: Task, table: Table) -> Ints:
    assert task.media is not None
    column = table.data.data.column(task.media.column)
    return column.is_valid().to_numpy()


def _path(task: Task, row: Row) -> str:
    assert task.media is not None
    if task.media.column not in row.values:
        raise InputError(
            f"{row.where}: no column '{task.media.column}' (media.column of task {task.name})",
            hint=f"columns there: {', '.join(row.values)}",
        )
    cell = row.values[task.media.column]
    return json.dumps(cell) if cell else ""


def _group(task: Task, example: Example, key: int) -> int:
    if not task.apart:
        return key
    return hash64(join_key([example.fields[name] for name in task.apart if name in example.fields or name in DRAWN]))


def _check_answers(task: Task, table: Table, without: int, usable: int) -> None:
    if without and without > MOST_WITHOUT_ANSWER * (without + usable):
        raise InputError(
            f"{table.origin}: {without} of {without + usable} rows have no answer to train on or compare with",
            hint=f"correct columns.label (or messages) of task {task.name}",
        )


def unique(task: Task, found: Survey, dropped: Counter[str]) -> Survey:
    """The first of each text. With fixed choices a text with two answers goes out: neither is sure."""
    order = np.lexsort((found.rows, found.answers, found.keys))
    keys, answers = found.keys[order], found.answers[order]
    starts = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, bool)
    same = ~starts & np.concatenate([[False], answers[1:] == answers[:-1]])[: len(keys)]
    text = np.cumsum(starts) - 1
    if task.choices:
        changes = np.bincount(text, weights=~starts & ~same)
        unsure = (changes > 0)[text] if len(keys) else starts
        dropped["same text, different labels"] += int(unsure.sum())
    else:
        unsure = np.zeros(len(keys), bool)
    repeated = same & ~unsure
    dropped["duplicate text"] += int(repeated.sum())
    return found.take(np.sort(order[~unsure & ~repeated]))


def without_groups(found: Survey, held: Ints) -> Survey:
    return found.take(np.flatnonzero(~np.isin(found.groups, held)))


def split(task: Task, pool: Survey, sizes: tuple[int, int], draw: np.random.Generator) -> tuple[Survey, Survey]:
    """Test and training rows from one pool, at most `sizes`; a pool too small is shared out in proportion."""
    if task.apart:
        test = _whole_groups(pool, sizes, draw)
        rest = without_groups(pool, test.groups)
        return sample(task, test, sizes[0], draw), sample(task, rest, sizes[1], draw)
    queues = _queues(task, pool, draw)
    usable = min(map(len, queues)) * len(queues)
    if usable < sum(sizes):
        test_size = usable * sizes[0] // sum(sizes)
        sizes = (test_size, usable - test_size)
    first = [_quota(sizes[0], n, len(queues)) for n in range(len(queues))]
    test_places = [queue[:count] for queue, count in zip(queues, first)]
    rest_places = [queue[count:] for queue, count in zip(queues, first)]
    train_places = [queue[: _quota(sizes[1], n, len(queues))] for n, queue in enumerate(rest_places)]
    return pool.take(draw.permutation(np.concatenate(test_places))), pool.take(
        draw.permutation(np.concatenate(train_places))
    )


def sample(task: Task, pool: Survey, size: int, draw: np.random.Generator) -> Survey:
    """At most `size` rows; balanced: as many of each choice as the rarest one allows."""
    queues = _queues(task, pool, draw)
    size = min(size, min(map(len, queues)) * len(queues))
    places = [queue[: _quota(size, n, len(queues))] for n, queue in enumerate(queues)]
    return pool.take(draw.permutation(np.concatenate(places)))


def _queues(task: Task, pool: Survey, draw: np.random.Generator) -> list[Ints]:
    """Places in the pool, shuffled: one queue, or one a choice."""
    if not task.balanced:
        return [draw.permutation(len(pool))]
    return [draw.permutation(np.flatnonzero(pool.choices == choice)) for choice in range(len(task.choices))]


def _quota(size: int, number: int, count: int) -> int:
    return size // count + (number < size % count)


def _whole_groups(pool: Survey, sizes: tuple[int, int], draw: np.random.Generator) -> Survey:
    """Whole groups, until there are enough test rows, or their share of a pool that is too small."""
    wanted = min(sizes[0], len(pool) * sizes[0] // max(sum(sizes), 1) if len(pool) < sum(sizes) else sizes[0])
    names, counts = np.unique(pool.groups, return_counts=True)
    order = draw.permutation(len(names))
    enough = int(np.searchsorted(np.cumsum(counts[order]), wanted)) + 1 if wanted else 0
    return pool.take(np.flatnonzero(np.isin(pool.groups, names[order[:enough]])))

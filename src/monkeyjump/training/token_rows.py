"""Encoded training rows on disk: written once in one pass, read by number, never all in memory.

An Arrow file beside a JSON file that says what went into it. Both are there whole or not at all.

    input_ids, labels   int32 lists of one length; labels are -100 where nothing is supervised
    task                number of the task
    where               file and row that it came from
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from monkeyjump.tasks.cache import write_in_one_piece

ROWS, FACTS = "rows.arrow", "rows.json"
BATCH = 1000
TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema([("input_ids", TOKENS), ("labels", TOKENS), ("task", pa.int32()), ("where", pa.string())])


@dataclass
class Facts:
    """What is known of the rows of a file. `sha256` is of the rows, whatever the file's layout."""

    names: list[str]
    kept: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    longest_row: int = 0
    sha256: str = ""


class TokenRows:
    """Rows by number, as the collator takes them. Opened anew in each process that reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
        self._open()

    def _open(self) -> None:
        import datasets

        self._data = datasets.Dataset.from_file(str(self.folder / ROWS))
        self.tasks = np.concatenate([c.to_numpy() for c in self._data.data.column("task").chunks] or [np.zeros(0, int)])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "facts": self.facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """-> input_ids, attention_mask, labels (lists), task_ids and row_ids (int)."""
        row = self._data[int(index)]
        return {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": row["labels"],
            "task_ids": row["task"],
            "row_ids": int(index),
        }

    def where(self, index: int) -> str:
        """Task, file and row that a row came from."""
        row = self._data[int(index)]
        return f"{self.facts.names[row['task']]}: {row['where']}"


def write_rows(folder: Path, rows: Iterable[dict[str, Any]], facts: Facts) -> TokenRows:
    """Writes encoded rows (input_ids, labels, task, where) in one pass; `facts` is filled on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{ROWS}-part"
    digest = hashlib.sha256()
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for batch in _batches(_counted(rows, facts, digest)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
        aside.replace(folder / ROWS)
    finally:
        aside.unlink(missing_ok=True)
    facts.sha256 = digest.hexdigest()
    write_in_one_piece(folder / FACTS, json.dumps(asdict(facts), indent=1))  # last: it says that the rows are whole
    return TokenRows(folder)


def rows_are_there(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def _counted(rows: Iterable[dict[str, Any]], facts: Facts, digest: Any) -> Iterator[dict[str, Any]]:
    facts.kept = dict.fromkeys(facts.names, 0)
    for number, row in enumerate(rows):
        ids, labels = np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32)
        digest.update(ids.tobytes() + labels.tobytes())
        facts.kept[facts.names[row["task"]]] += 1
        facts.tokens += len(ids)
        facts.supervised += int((labels >= 0).sum())
        if len(ids) > facts.longest:
            facts.longest, facts.longest_row = len(ids), number
        yield row


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch

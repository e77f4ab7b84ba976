"""Rows as they are in a task's source, each with the place it came from.

Text formats are read line by line here, because an error must name the line; parquet and the Hub go
through the `datasets` library.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from monkeyjump.tasks.description import FileSource, HubSource, PackageSource, Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.packages import fetch, find_package, read_package


@dataclass(frozen=True)
class Row:
    """One raw row; `where` is 'file, row n'."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Split:
    """Raw rows of a task; `test` is None where test rows are to be drawn from `train`."""

    train: list[Row]
    test: list[Row] | None


def read_source(task: Task, say: Callable[[str], None] = lambda text: None) -> Split:
    """Raises InputError for a file that is empty, damaged or not of its format."""
    source = task.source
    if isinstance(source, PackageSource):
        return Split(_package_rows(source, say), None)
    if isinstance(source, FileSource):
        return Split(_file_rows(source.train), _file_rows(source.test) if source.test else None)
    train = _hub_rows(source, source.train_split)
    return Split(train, _hub_rows(source, source.test_split) if source.test_split else None)


def _package_rows(source: PackageSource, say: Callable[[str], None]) -> list[Row]:
    path = fetch(find_package(source.package), say)
    rows: list[Row] = []
    for name, data in read_package(path, source.files, source.archive).items():
        text = decode(data, name, source.undecodable)
        if source.format == "text":
            rows.append(Row({"text": text, "folder": PurePosixPath(name).parent.name}, name))
        else:
            rows += parse_separated(text, PurePosixPath(name).name, "\t", source.header)
    return rows


def _file_rows(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        rows = _load_rows(str(path), "parquet", data_files=str(path), split="train")
    else:
        text = decode(path.read_bytes(), str(path))
        if path.suffix == ".jsonl":
            rows = list(parse_json_lines(text, str(path)))
        else:
            rows = list(parse_separated(text, str(path), "," if path.suffix == ".csv" else "\t"))
    if not rows:
        raise InputError(f"{path}: no rows", hint="the file is empty; point `source` at the right one")
    return rows


def _hub_rows(source: HubSource, split: str) -> list[Row]:
    origin = f"{source.id}[{split}]"
    rows = _load_rows(origin, source.id, name=source.config, split=split, revision=source.revision)
    if not rows:
        raise InputError(f"{origin}: no rows", hint="correct train_split or test_split of the task")
    return rows


def _load_rows(origin: str, path: str, **options: Any) -> list[Row]:
    import datasets  # one second: only where it is needed

    try:
        data = datasets.load_dataset(path, **options)
    except Exception as error:  # the Hub, Arrow and fsspec each raise a family of their own
        reason = " ".join(str(error).split())
        raise InputError(
            f"{origin}: cannot be loaded: {type(error).__name__}: {reason}",
            hint="check id, config, split and the network; local files need none",
        ) from error
    return [Row(row, f"{origin}, row {number}") for number, row in enumerate(data, start=1)]


def decode(data: bytes, name: str, undecodable: str = "strict") -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig", errors=undecodable)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from None


def parse_json_lines(text: str, name: str) -> Iterator[Row]:
    """One object a line; blank lines are passed over. `splitlines` would also cut at U+2028."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, row {number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not JSON: {error.msg} at column {error.colno}",
                hint="each line must be one JSON object",
            ) from None
        if not isinstance(values, dict):
            raise InputError(
                f"{where}: expected an object, found {type(values).__name__}",
                hint='each line must be one JSON object, such as {"text": "fine", "label": "positive"}',
            )
        yield Row(values, where)


def parse_separated(text: str, name: str, delimiter: str, header: list[str] | None = None) -> list[Row]:
    """Comma or tab separated text. Quotes are plain characters in a tab separated file."""
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting)
    rows = []
    columns = header or None
    for cells in reader:
        if not cells:
            continue
        if columns is None:
            columns = cells
            continue
        where = f"{name}, row {reader.line_num}"
        if len(cells) != len(columns):
            raise InputError(
                f"{where}: {len(cells)} cells for {len(columns)} columns ({', '.join(columns)})",
                hint="quote a cell that contains the separator",
            )
        rows.append(Row(dict(zip(columns, cells)), where))
    return rows

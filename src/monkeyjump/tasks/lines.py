"""Lines of text to rows, with the number of the line in every complaint."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monkeyjump.tasks.errors import InputError


@dataclass(frozen=True)
class Row:
    """One raw row; `where` is 'file, row n'."""

    values: dict[str, Any]
    where: str
    line: int = 0


def read_lines(path: Path) -> Iterator[str]:
    """UTF-8 with or without a byte order mark. Only a line feed ends a line: JSON may hold U+2028."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield decode(line, str(path), first=number)


def text_lines(text: str) -> Iterator[str]:
    return iter(io.StringIO(text, newline=""))


def decode(data: bytes, name: str, undecodable: str = "strict", first: int = 1) -> str:
    """`data` begins at line `first` of the file `name`."""
    try:
        return data.decode("utf-8-sig" if first == 1 else "utf-8", errors=undecodable)
    except UnicodeDecodeError as error:
        line = first + data[: error.start].count(b"\n")
        raise InputError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
        ) from None


def parse_json_lines(lines: Iterable[str], name: str) -> Iterator[Row]:
    """One object a line; blank lines are passed over."""
    for number, line in enumerate(lines, start=1):
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
        yield Row(values, where, number)


def parse_separated(lines: Iterable[str], name: str, delimiter: str, header: list[str] | None = None) -> Iterator[Row]:
    """Comma or tab separated text. Quotes are plain characters in a tab separated file."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default cuts off long documents
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    columns = header or None
    try:
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
            yield Row(dict(zip(columns, cells)), where, reader.line_num)
    except csv.Error as error:
        raise InputError(f"{name}, row {reader.line_num}: {error}", hint="check the quotes in this line") from None

"""The raw rows of a task's source, on disk and read one by one.

Text files are read line by line here, because an error must name the line. Each row goes as JSON text into
an Arrow file of the cache, with its line: memory-mapped, no schema to guess, one pass. Parquet, the Hub and
folders of images go through the `datasets` library, which maps them likewise. Whatever the size of a source,
memory holds one row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from monkeyjump.tasks.cache import home
from monkeyjump.tasks.description import Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.lines import Row, decode, parse_json_lines, parse_separated, read_lines, text_lines
from monkeyjump.tasks.origins import FileSource, HubSource, PackageSource, resolve, row_files, suffix_of
from monkeyjump.tasks.packages import fetch, find_package, read_package

ROW, FILE, LINE = "__row", "__file", "__line"  # columns of our Arrow files
BATCH = 10_000


@dataclass(frozen=True)
class Table:
    """Raw rows of one split. `files` is set where `data` holds JSON text: the names that FILE counts."""

    data: Any  # datasets.Dataset
    origin: str
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        return self._row(index, self.data[index])

    def scan(self, columns: Iterable[str]) -> Iterator[Row]:
        """All rows in order, with these columns where they exist (pictures stay on disk if not among them)."""
        data = self.data
        if not self.files:
            data = data.select_columns([name for name in data.column_names if name in set(columns)])
        for index, values in enumerate(data):
            yield self._row(index, values)

    def _row(self, index: int, values: dict[str, Any]) -> Row:
        if not self.files:
            return Row(values, f"{self.origin}, row {index + 1}")
        return Row(json.loads(values[ROW]), f"{self.files[values[FILE]]}, row {values[LINE]}")

    @property
    def column_names(self) -> list[str] | None:
        """None where each row may have its own."""
        return None if self.files else self.data.column_names

    def stored(self, index: int, column: str) -> Any:
        """A cell as it lies on disk, nothing decoded: an encoded picture, for instance."""
        return self.data.data.column(column)[index].as_py()

    def is_embedded(self, column: str) -> bool:
        """Pictures are in the column itself, encoded."""
        if self.files or column not in self.data.column_names:
            return False
        kind = self.data.features[column]
        return not isinstance(kind, dict) and getattr(kind, "feature", kind).dtype not in ("string", "large_string")


@dataclass(frozen=True)
class Split:
    """Raw rows of a task; `test` is None where test rows are to be drawn from `train`."""

    train: Table
    test: Table | None


def read_source(task: Task, say: Callable[[str], None] = lambda text: None) -> Split:
    """Raises InputError for a file that is empty, damaged or not of its format."""
    source = task.source
    if isinstance(source, PackageSource):
        return Split(_package_table(source, say), None)
    if isinstance(source, FileSource):
        return Split(_file_table(source.train), _file_table(source.test) if source.test else None)
    train = _hub_table(source, source.train_split)
    return Split(train, _hub_table(source, source.test_split) if source.test_split else None)


def _package_table(source: PackageSource, say: Callable[[str], None]) -> Table:
    import datasets  # one second: only where it is needed

    path = fetch(find_package(source.package), say)
    names: list[str] = []
    rows: list[tuple[Row, int]] = []
    for name, data in read_package(path, source.files, source.archive).items():
        text = decode(data, name, source.undecodable)
        if source.format == "text":
            found = [Row({"text": text, "folder": PurePosixPath(name).parent.name}, name, 1)]
        else:
            found = list(parse_separated(text_lines(text), PurePosixPath(name).name, "\t", source.header))
        rows += [(row, len(names)) for row in found]
        names.append(PurePosixPath(name).name if source.format == "tsv" else name)
    return Table(datasets.Dataset(pa.Table.from_batches([_batch(rows)])), path.name, tuple(names))


def _file_table(path: Path) -> Table:
    paths = row_files(path)
    suffix = suffix_of(paths[0])
    if suffix == "parquet":
        return _datasets_table(str(path), "parquet", data_files=[str(file) for file in paths], split="train")
    if suffix not in ("jsonl", "csv", "tsv"):
        return _datasets_table(str(path), "imagefolder", data_dir=str(path), split="train")
    return _text_table(path, paths, suffix)


def _text_table(path: Path, paths: Sequence[Path], suffix: str) -> Table:
    import datasets

    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
    name = hashlib.sha256(json.dumps([stamps, suffix]).encode()).hexdigest()[:24]
    arrow = home() / "rows" / f"{name}.arrow"
    if not arrow.exists():
        _write_arrow(arrow, paths, suffix)
    data = datasets.Dataset.from_file(str(arrow))
    if not len(data):
        raise InputError(f"{path}: no rows", hint="the file is empty; point `source` at the right one")
    return Table(data, str(path), tuple(str(file) for file in paths))


def _write_arrow(arrow: Path, paths: Sequence[Path], suffix: str) -> None:
    """One pass over the files; nothing is left behind where a line is wrong."""
    arrow.parent.mkdir(parents=True, exist_ok=True)
    aside = arrow.with_suffix(f".{hashlib.sha256(repr(paths).encode()).hexdigest()[:8]}.part")
    try:
        with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, _batch([]).schema) as writer:
            pending: list[tuple[Row, int]] = []
            for number, path in enumerate(paths):
                for row in _parse(path, suffix):
                    pending.append((row, number))
                    if len(pending) == BATCH:
                        writer.write_batch(_batch(pending))
                        pending.clear()
            writer.write_batch(_batch(pending))
        aside.replace(arrow)
    finally:
        aside.unlink(missing_ok=True)


def _parse(path: Path, suffix: str) -> Iterator[Row]:
    lines = read_lines(path)
    if suffix == "jsonl":
        return parse_json_lines(lines, str(path))
    return parse_separated(lines, str(path), "," if suffix == "csv" else "\t")


def _batch(rows: Sequence[tuple[Row, int]]) -> pa.RecordBatch:
    columns = {
        ROW: pa.array([json.dumps(row.values, ensure_ascii=False) for row, _ in rows], pa.large_string()),
        FILE: pa.array([file for _, file in rows], pa.int32()),
        LINE: pa.array([row.line for row, _ in rows], pa.int64()),
    }
    return pa.RecordBatch.from_pydict(columns)


def _hub_table(source: HubSource, split: str) -> Table:
    name, revision = resolve(source)
    options = {"name": source.config, "split": split, "revision": revision}
    table = _datasets_table(f"{name}[{split}]", name, source.stream, **options)
    if not len(table):
        raise InputError(f"{table.origin}: no rows", hint="correct train_split or test_split of the task")
    return table


def hub_rows(source: HubSource, split: str) -> Iterator[Row]:
    """The rows of a split one after the other, as they come over the network; none is kept."""
    import datasets

    name, revision = resolve(source)
    origin = f"{name}[{split}]"
    try:
        _reach_hub(name)
        stream = datasets.load_dataset(name, source.config, split=split, revision=revision, streaming=True)
        for number, values in enumerate(stream, start=1):
            yield Row(values, f"{origin}, row {number}", number)
    except Exception as error:
        raise _not_loaded(origin, error) from error


def _reach_hub(name: str) -> None:
    """One request: without a network, `datasets` would try again for minutes before it says so."""
    from huggingface_hub import constants, get_session

    if not (constants.HF_HUB_OFFLINE or Path(name).exists()):
        get_session().head(constants.ENDPOINT, timeout=10)


def _datasets_table(origin: str, path: str, first: int | None = None, **options: Any) -> Table:
    import datasets

    try:
        if first is None:
            return Table(datasets.load_dataset(path, **options), origin)
        stream = datasets.load_dataset(path, streaming=True, **options).take(first)
        return Table(datasets.Dataset.from_generator(_each, stream.features, gen_kwargs={"stream": stream}), origin)
    except Exception as error:  # the Hub, Arrow and fsspec each raise a family of their own
        raise _not_loaded(origin, error) from error


def _not_loaded(origin: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(
        f"{origin}: cannot be loaded: {type(error).__name__}: {reason}",
        hint="check id, config, split and the network; local files need none",
    )


def _each(stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from stream

"""Tasks as tables: for a terminal and for docs/tasks.md."""

from __future__ import annotations

from collections.abc import Iterable

from monkeyjump.tasks.description import Task
from monkeyjump.tasks.metric_names import KNOWN
from monkeyjump.tasks.origins import FileSource, HubSource, hub_table, resolve
from monkeyjump.tasks.reading import catalog, read_task

HEADINGS = (
    "task",
    "family",
    "Hub id (config)",
    "splits",
    "train rows",
    "test rows",
    "metric",
    "columns known from",
    "loaded for real",
)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def source_of(task: Task) -> str:
    """Where the rows are, in a few words."""
    source = task.source
    if isinstance(source, HubSource):
        name, _ = resolve(source)
        return f"{name} ({source.config})" if source.config else name
    if isinstance(source, FileSource):
        return str(source.train)
    return f"package {source.package}"


def rows_of(task: Task) -> str:
    """Training and test rows, at most: the paper's where it says them, else the task's own full size."""
    train, test = task.sizes.full.train, task.sizes.full.test
    if task.paper:
        train, test = task.paper.train or train, task.paper.test
    return f"{_count(train)} / {_count(test)}"


def _count(size: int | None) -> str:
    return "all" if size is None else f"{size:,}"


def suite() -> list[Task]:
    """The paper's 47 tasks, by modality and family."""
    tasks = [read_task(path) for path in catalog("suite").values()]
    order = {"text": 0, "image": 1, "video": 2}
    return sorted(tasks, key=lambda task: (order[task.modality], task.family, task.name))


def mamba_suite() -> list[Task]:
    """What Mamba models are evaluated on, beside perplexity."""
    return [read_task(path) for path in catalog("mamba").values()]


def _sizes_of(task: Task) -> tuple[str, str]:
    """Training and test rows as the table says them: the paper's, or at most the task's own full size."""
    most = task.sizes.full
    if task.tests_only:
        return "none", _count(most.test)
    if task.paper is None:
        return f"≤ {_count(most.train)}", f"≤ {_count(most.test)}"
    return f"{task.paper.train:,}" if task.paper.train else f"≤ {_count(most.train)}", f"{task.paper.test:,}"


def markdown_table(tasks: Iterable[Task]) -> str:
    """The table of docs/tasks.md."""
    table = hub_table()
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    for task in tasks:
        source = task.source
        assert isinstance(source, HubSource)
        entry = table[source.id]
        cells = [
            task.name,
            f"{task.family} ({task.modality})",
            source_of(task),
            f"{source.train_split} / {source.test_split or 'same'}",
            *_sizes_of(task),
            ", ".join([task.metric, *task.also]),
            entry.columns,
            entry.loaded,
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def metric_table() -> str:
    return "\n".join(
        ["| metric | what it is |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in KNOWN.items())]
    )


def notes() -> str:
    """What the data sets' entries say, one line each."""
    return "\n".join(f"* `{entry.id}`: {entry.note}." for entry in hub_table().values() if entry.note)

"""`monkeyjump tasks`: what tasks there are, what one shows the model, whether one's own is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monkeyjump.tasks.description import Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.listing import mamba_suite, markdown_table, metric_table, notes, rows_of, source_of, suite
from monkeyjump.tasks.origins import FileSource, PackageSource
from monkeyjump.tasks.packages import PACKAGES, cached
from monkeyjump.tasks.reading import catalog, find_task, read_task

if TYPE_CHECKING:
    from monkeyjump.cli.screen import Screen


def tasks(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="A task or a YAML file to show; or `validate` and YAML files. Default: list all."),
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Show a row even if it must be downloaded first.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The tables of docs/tasks.md.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """List the tasks, show one, or check a task of your own.

    Examples:

      monkeyjump tasks

      monkeyjump tasks boolq

      monkeyjump tasks my-task.yaml

      monkeyjump tasks validate my-task.yaml other-task.yaml
    """
    from monkeyjump.cli.screen import Screen

    screen = Screen()
    if markdown:
        screen.say("\n\n".join([metric_table(), markdown_table(suite()), markdown_table(mamba_suite()), notes()]))
    elif not names:
        _list(screen)
    elif names[0] == "validate":
        _validate([Path(name) for name in names[1:]], screen)
    else:
        for name in names:
            _show(find_task(name), fetch, screen)


def _list(screen: Screen) -> None:
    from rich.table import Table

    table = Table(title="Tasks", title_justify="left")
    table.add_column("task", no_wrap=True)
    for column in ("family", "modality", "rows\n(train / test)", "metric", "source"):
        table.add_column(column, overflow="fold")
    for path in catalog("demo").values():
        _add(table, read_task(path))
    table.add_section()
    for task in suite():
        _add(table, task)
    table.add_section()
    for task in mamba_suite():
        _add(table, task)
    screen.out.print(table)
    screen.say("`monkeyjump tasks NAME` shows one; a task of your own is one YAML file (docs/tasks.md).")


def _add(table: object, task: Task) -> None:
    table.add_row(task.name, task.family, task.modality, rows_of(task), task.metric, source_of(task))  # type: ignore[attr-defined]


def _show(task: Task, fetch: bool, screen: Screen) -> None:
    screen.say(f"Task {task.name}: {task.family}, {task.modality}")
    screen.say(f"Rows: {source_of(task)}; at most {rows_of(task)} (train / test)")
    screen.say(f"Metric: {', '.join([task.metric, *task.also])}")
    screen.say(f"Answer: {_answers(task)}")
    if task.messages:
        screen.say(f"Prompt: the chat in column {task.messages}, up to its last turn")
    else:
        screen.say(f"Instruction:\n{_indented(task.instruction)}")
    if fetch or _is_here(task):
        _show_row(task, screen)
    else:
        screen.say("Its rows are not on this machine; --fetch downloads them and shows one.")


def _answers(task: Task) -> str:
    if task.choices:
        shown = ", ".join(task.choices[:8])
        return f"one of {len(task.choices)} ({shown}{', ...' if len(task.choices) > 8 else ''})"
    if task.options:
        return f"one of the row's own options, by its {task.options.say}"
    return {"text": "free text", "number": f"a number {task.range or ''}".strip()}[task.answer]


def _is_here(task: Task) -> bool:
    if isinstance(task.source, PackageSource):
        return cached(PACKAGES[task.source.package]).exists()
    return isinstance(task.source, FileSource)


def _show_row(task: Task, screen: Screen) -> None:
    from monkeyjump.tasks.loading import counts, load_task

    loaded = load_task(task, "full", say=screen.note)
    screen.say(f"Found: {len(loaded.train):,} training rows, {len(loaded.test):,} test rows ({counts(loaded.dropped)})")
    example = (loaded.train or loaded.test)[0]
    if example.turns:
        text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in example.turns)
    else:
        text = task.instruction.format(**example.fields)
    pictures = (
        f" [{len(example.media)} {'frames' if task.modality == 'video' else 'pictures'}]" if example.media else ""
    )
    screen.say(f"{'A training' if loaded.train else 'A test'} row ({example.where}){pictures}:\n{_indented(text)}")
    screen.say(f"  -> {f'{task.answer_prefix} {example.gold[0]}'.strip()}")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _validate(paths: list[Path], screen: Screen) -> None:
    """Every file is looked at; what is wrong is said of all of them together."""
    from monkeyjump.tasks.loading import counts, load_task

    if not paths:
        raise InputError("tasks validate: no file given", hint="monkeyjump tasks validate my-task.yaml")
    wrong: list[InputError] = []
    for path in paths:
        try:
            if not path.is_file():
                raise InputError(f"{path}: no such file", hint="give the path of a task's YAML file")
            task = read_task(path)
            if not _is_here(task):
                screen.say(f"{path}: the description is right; its rows were not looked at")
                continue
            loaded = load_task(task, "all", say=screen.note)
        except InputError as error:
            wrong.append(error)
        else:
            found = f"{len(loaded.train):,} training rows, {len(loaded.test):,} test rows"
            screen.say(f"{path}: right: {found} ({counts(loaded.dropped)})")
    if wrong:
        hints = dict.fromkeys(error.hint for error in wrong if error.hint)
        raise InputError("; ".join(map(str, wrong)), hint="; ".join(hints))

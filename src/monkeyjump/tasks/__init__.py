"""Tasks: their descriptions, their rows, their prompts; and where data and the demo's model come from."""

from monkeyjump.tasks.description import Task, catalog, find_task, read_task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.loading import Example, LoadedTask, load_task
from monkeyjump.tasks.mixture import Mixture, TestSet, mix
from monkeyjump.tasks.prompts import Collator, Prompts

__all__ = [
    "Collator",
    "Example",
    "InputError",
    "LoadedTask",
    "Mixture",
    "Prompts",
    "Task",
    "TestSet",
    "catalog",
    "find_task",
    "load_task",
    "mix",
    "read_task",
]

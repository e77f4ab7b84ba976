"""Tasks: their descriptions, their rows, their prompts; and where data and the demo's model come from."""

from .description import Task, catalog, find_task, read_task
from .errors import InputError
from .loading import Example, LoadedTask, load_task
from .mixture import Mixture, TestSet, mix
from .prompts import Collator, Prompts

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

"""Tasks: their descriptions, their rows, their prompts; and where data and the demo's model come from."""

from monkeyjump.tasks.blending import Blend, Mixing, blend
from monkeyjump.tasks.description import Size, Task
from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.examples import Example
from monkeyjump.tasks.loading import Examples, LoadedTask, load_task
from monkeyjump.tasks.overlap import Overlap, find_overlap
from monkeyjump.tasks.prompts import Collator, Prompts
from monkeyjump.tasks.reading import catalog, find_task, read_task

__all__ = [
    "Blend",
    "Collator",
    "Example",
    "Examples",
    "InputError",
    "LoadedTask",
    "Mixing",
    "Overlap",
    "Prompts",
    "Size",
    "Task",
    "blend",
    "catalog",
    "find_overlap",
    "find_task",
    "load_task",
    "read_task",
]

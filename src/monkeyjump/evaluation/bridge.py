"""lm-eval's own tasks, with our loaded model: a thin wrapper, nothing of theirs is copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monkeyjump.evaluation.run import FOLDER, load_subject
from monkeyjump.tasks import InputError
from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.errors import near_miss
from monkeyjump.tasks.models import load_tokenizer
from monkeyjump.training.folder import write_json
from monkeyjump.training.models import place_of
from monkeyjump.training.subject import Subject


def run_lm_eval(subject: Subject, tasks: Sequence[str], limit: int | None, batch_size: int) -> str:
    """Runs lm-eval's tasks; its table as text. Results go into the subject's folder.

    Args:
        tasks: names that lm-eval knows, or YAML files in its format.

    Raises:
        InputError: lm-eval is not installed or does not know a task, or the adapter routes whole sequences, of
            which lm-eval does not say where the prompt ends.
    """
    if subject.granularity != "token":
        raise InputError(
            f"--lm-eval: granularity={subject.granularity!r} decides on the prompt, which lm-eval does not mark",
            hint="use --tasks with a task of your own, or a run with granularity=token",
        )
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise InputError(
            f"--lm-eval needs the lm-eval package: {error}", hint="python -m pip install 'monkeyjump[eval]'"
        ) from error
    named = [name for name in tasks if not Path(name).is_file()]
    manager = TaskManager(include_defaults=bool(named))  # reading its thousands of tasks takes a while
    unknown = next((name for name in named if not manager.match_tasks([name])), None)
    if unknown is not None:
        raise InputError(
            f"--lm-eval: lm-eval has no task '{unknown}'", hint=near_miss(unknown, manager.all_tasks, "its tasks")
        )
    place = place_of(subject.model)
    model = load_subject(subject, place)
    wrapped = HFLM(pretrained=model, tokenizer=load_tokenizer(place), batch_size=batch_size)
    found: Any = lm_eval.simple_evaluate(
        model=wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
    )
    write_json(subject.folder / FOLDER / "lm_eval" / "results.json", found["results"])
    table = make_table(found)
    write_in_one_piece(subject.folder / FOLDER / "lm_eval" / "results.md", table)
    return table

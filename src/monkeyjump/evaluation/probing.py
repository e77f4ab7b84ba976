"""Linear probes of a trained adapter: its model, its rows, its folder."""

from __future__ import annotations

from dataclasses import asdict

from monkeyjump.evaluation.probes import Probe, probe_task
from monkeyjump.evaluation.questions import Questions
from monkeyjump.evaluation.run import FOLDER, load_subject, task_number
from monkeyjump.tasks import Collator, InputError
from monkeyjump.training.data import load_tasks, prompts_for
from monkeyjump.training.display import Display
from monkeyjump.training.folder import write_json
from monkeyjump.training.models import model_config, place_of
from monkeyjump.training.subject import Subject


def probe_run(
    subject: Subject, display: Display, layers: list[int] | None = None, limit: int = 1000, batch_size: int = 16
) -> list[Probe]:
    """Raises InputError where a block is not there, or no task has closed answers."""
    place = place_of(subject.model, display.note)
    blocks = model_config(subject.model, place).get_text_config().num_hidden_layers
    layers = [blocks // 2, blocks - 1] if layers is None else layers
    wrong = next((layer for layer in layers if layer >= blocks), None)
    if wrong is not None:
        raise InputError(f"--layers: the model has no block {wrong}", hint=f"blocks are 0 to {blocks - 1}")
    tasks = [one for one in load_tasks(subject.asked) if not one.task.is_free]
    if not tasks:
        raise InputError(f"{subject.folder}: no task with closed answers", hint="probes need choices to tell apart")
    prompts = prompts_for([one.task for one in tasks], place, subject.asked.max_length)
    model = load_subject(subject, place)
    collator = Collator.of(prompts.tokenizer)
    found: list[Probe] = []
    with display.bar("probe", len(tasks)) as bar:
        for one in tasks:
            number = task_number(subject, one.task.name)
            known = Questions(one.task, one.train.take(slice(limit)), prompts, number)
            asked = Questions(one.task, one.test.take(slice(limit)), prompts, number)
            found += probe_task(model, one.task.name, known, asked, collator, layers, batch_size)  # type: ignore[arg-type]
            bar.advance(1)
    write_json(subject.folder / FOLDER / "probes.json", {"probes": [asdict(one) for one in found]})
    return found

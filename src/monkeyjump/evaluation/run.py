"""A trained run, an adapter or a whole model on the test rows of tasks; everything is written into its folder."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError

from monkeyjump.evaluation.metrics import check_packages
from monkeyjump.evaluation.questions import Questions, told
from monkeyjump.evaluation.results import TaskResult, record_of, result_from, result_of
from monkeyjump.evaluation.sandbox import check_tasks
from monkeyjump.evaluation.scoring import answer, tokens_of
from monkeyjump.mamba.loading import load_model
from monkeyjump.moe.tasks import UNKNOWN
from monkeyjump.tasks import Collator, InputError, LoadedTask
from monkeyjump.tasks.cache import MANIFEST, sha256_of, verify_manifest, write_in_one_piece
from monkeyjump.training import folder as files
from monkeyjump.training.data import describe, fingerprint, load_tasks, prompts_for
from monkeyjump.training.display import Display
from monkeyjump.training.models import load, model_config, place_of
from monkeyjump.training.subject import MODEL_CONFIG, Subject, read_adapter

FOLDER, RESULTS = "evaluation", "results.json"
WEIGHTS = "*.safetensors"  # of a whole model
EFFECT_ROWS = 8


def evaluate(
    subject: Subject,
    display: Display,
    limit: int | None = None,
    batch_size: int = 16,
    write: bool = False,
    base: bool = False,
) -> list[TaskResult]:
    """Scores an adapter or a whole model on the tasks that it is asked, and writes results.json and results.csv.

    Args:
        limit: at most so many rows of each task.
        write: let the model also write its answers to closed questions.
        base: the untouched base model instead of the adapter.

    Raises:
        InputError: the adapter is damaged or has no effect, a whole model has no base, or tasks are wrong.
    """
    if base:
        check_base(subject)
    loaded = load_tasks(subject.asked)
    check_tasks(one.task for one in loaded)
    check_packages(metric for one in loaded for metric in (one.task.metric, *one.task.also))
    asked = {
        "tasks": {one.task.name: fingerprint(one) for one in loaded},
        "max_length": subject.asked.max_length,
        "limit": limit,
        "write": write,
        "model": subject.model.model_dump(),
        "adapter": None if base else sums(subject),
    }
    if (known := read_results(subject.folder, asked, base)) is not None:
        display.note(f"{subject.folder}: evaluated already")
        return known
    place = place_of(subject.model, display.note)
    tests = questions_of(subject, loaded, place, limit)
    strangers = [one.task.name for one in tests if one.task_id == UNKNOWN]
    if strangers and not base:
        display.note(f"{', '.join(strangers)}: not among the adapter's tasks; each row takes the nearest of them")
    model = load_plain(subject, place) if base else load_subject(subject, place)
    collator = Collator.of(tests[0].prompts.tokenizer)
    if not base and subject.adapter is not None:
        check_effect(model, tests[0], collator)
    name = "base" if base else subject.folder.name
    with display.bar(f"evaluate {name}", sum(tokens_of(one, write) for one in tests)) as bar:
        answers = answer(model, tests, collator, batch_size, bar.advance, write=write)
    results = [result_of(one.task, given) for one, given in zip(tests, answers)]
    write_results(subject.folder, results, asked, base)
    return results


def check_base(subject: Subject) -> None:
    """Raises InputError where there is no base model beside the one in the folder."""
    if subject.adapter is None:
        raise InputError(f"{subject.folder} is a whole model: there is no base", hint="compare it with another folder")


def questions_of(subject: Subject, loaded: Sequence[LoadedTask], place: str, limit: int | None) -> list[Questions]:
    """The test rows of tasks."""
    prompts = prompts_for([one.task for one in loaded], place, subject.asked.max_length)
    return [
        Questions(one.task, one.test.take(slice(limit)), prompts, task_number(subject, one.task.name)) for one in loaded
    ]


def task_number(subject: Subject, name: str) -> int:
    """The number by which an adapter that tells tasks apart knows a task.

    MoRE has the names in its config, and takes the nearest of its tasks for one that is not among them; a router of
    Monkey Jump takes it for the first that it was trained on.
    """
    adapter = {} if subject.adapter is None else read_adapter(subject.adapter)
    if "num_tasks" in adapter:
        names, unknown = adapter.get("task_names") or [], UNKNOWN
    else:
        names, unknown = [task.name for task in describe(subject.trained)], 0
    return names.index(name) if name in names else unknown


def load_plain(subject: Subject, place: str) -> Any:
    """The model without an adapter, on its device: shrunk ones as well, Mamba on our scans. Raises InputError."""
    model_config(subject.model, place)  # says what cannot be read
    return on_device(load_model(place, functools.partial(load, subject.model)))


def load_subject(subject: Subject, place: str) -> Any:
    """The base model with the adapter, or the whole model, on its device.

    Raises InputError for what is damaged or does not fit.
    """
    import monkeyjump  # noqa: F401  registers the adapter types with PEFT

    if subject.adapter is None:
        return load_plain(subject, place)
    if (subject.adapter / MANIFEST).is_file():
        verify_manifest(subject.adapter)
    try:
        model = PeftModel.from_pretrained(load_plain(subject, place), subject.adapter).eval()
    except InputError:
        raise
    except (ValueError, OSError, SafetensorError) as error:
        raise InputError(
            f"{subject.adapter}: cannot be loaded: {error}", hint="copy it again, or train it anew"
        ) from error
    return on_device(model)


def on_device(model: Any) -> Any:
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def check_effect(model: PeftModel, questions: Questions, collator: Collator) -> None:
    """Refuses an adapter that changes nothing: its table would be the base model's. Raises InputError."""
    asked = [questions[row] for row in range(min(EFFECT_ROWS, len(questions)))]
    batch = collator([{**question.inputs, "attention_mask": [1] * question.length} for question in asked])
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad(), told(model, asked):
        adapted = model(**inputs).logits
        with model.disable_adapter():
            plain = model(**inputs).logits
    if torch.equal(adapted, plain):
        raise InputError(
            "the adapter has no effect: the model answers exactly as without it",
            hint="it was not trained, or on another model; `monkeyjump plan` on its config says what it adapts",
        )


def write_results(folder: Path, results: list[TaskResult], asked: dict[str, Any], base: bool) -> None:
    place = _place(folder, base)
    write_in_one_piece(place / "results.csv", as_csv(results))
    files.write_json(place / RESULTS, {"asked": asked, "tasks": [record_of(result) for result in results]})


def read_results(folder: Path, asked: dict[str, Any], base: bool) -> list[TaskResult] | None:
    """What an earlier evaluation of the same adapter on the same rows wrote; None where there is none."""
    path = _place(folder, base) / RESULTS
    if not path.is_file():
        return None
    record = files.read_json(path)
    return [result_from(one) for one in record["tasks"]] if record["asked"] == asked else None


def _place(folder: Path, base: bool) -> Path:
    return folder / FOLDER / ("base" if base else "adapter")


def sums(subject: Subject) -> list[str]:
    """sha256 of the config and weights of the adapter or model. Raises InputError where one is missing."""
    if subject.adapter is None:
        return [sha256_of(path) for path in (subject.folder / MODEL_CONFIG, *sorted(subject.folder.glob(WEIGHTS)))]
    found = [subject.adapter / CONFIG_NAME, subject.adapter / SAFETENSORS_WEIGHTS_NAME]
    missing = next((path for path in found if not path.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing}: missing", hint="copy the adapter again, or train it anew")
    return [sha256_of(path) for path in found]


def as_csv(results: Sequence[TaskResult]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["task", "family", "metric", "answers", "rows", "value", "low", "high", "standard_error"])
    for one in results:
        for kind, scores in (("chosen" if one.written else "", one.scores), ("written", one.written)):
            for metric, found in scores.items():
                numbers = (found.value, found.low, found.high, found.standard_error)
                writer.writerow([one.task, one.family, metric, kind, one.rows, *(f"{n:.6f}" for n in numbers)])
    return sink.getvalue()

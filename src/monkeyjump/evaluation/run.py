"""A trained run, or an adapter's folder, on its tasks' test rows; everything is written into the run's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from monkeyjump.evaluation.questions import Questions, told
from monkeyjump.evaluation.results import TaskResult, record_of, result_from, result_of
from monkeyjump.evaluation.scoring import answer, tokens_of
from monkeyjump.tasks import Collator, InputError
from monkeyjump.tasks.cache import MANIFEST, sha256_of, verify_manifest, write_in_one_piece
from monkeyjump.training import folder as files
from monkeyjump.training.config import RunConfig
from monkeyjump.training.data import describe, load_tasks, prompts_for
from monkeyjump.training.models import load, place_of

FOLDER, RESULTS = "evaluation", "results.json"
EFFECT_ROWS = 8


class Bar(Protocol):
    def advance(self, steps: int = 1, note: str = "") -> None: ...


class Display(Protocol):
    def note(self, text: str) -> None: ...

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]: ...


def evaluate_run(
    folder: Path,
    display: Display,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 16,
    write: bool = False,
    base: bool = False,
) -> list[TaskResult]:
    """Scores a run on its own tasks or on others, and writes results.json, results.csv and results.md.

    Args:
        tasks: names or YAML files; none: those that it was trained on.
        limit: at most so many rows of each task.
        write: let the model also write its answers to closed questions.
        base: the untouched base model instead of the adapter.

    Raises:
        InputError: the run is not done, its adapter is damaged or has no effect, or tasks are wrong.
    """
    config = open_finished(folder)
    asked = {"tasks": list(tasks), "limit": limit, "write": write, "adapter": None if base else _adapter_sum(folder)}
    if (known := read_results(folder, asked, base)) is not None:
        display.note(f"{folder}: evaluated already")
        return known
    tests = questions_of(config, tasks, limit)
    place = place_of(config.model, display.note)
    model = load(config.model, place) if base else load_adapted(config, folder, place)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    collator = Collator.of(tests[0].prompts.tokenizer)
    if not base:
        check_effect(model, tests[0], collator)
    name = "base" if base else folder.name
    with display.bar(f"evaluate {name}", sum(tokens_of(one, write) for one in tests)) as bar:
        answers = answer(model, tests, collator, batch_size, bar.advance, write=write)
    results = [result_of(one.task, given) for one, given in zip(tests, answers)]
    write_results(folder, results, asked, base)
    return results


def open_finished(folder: Path) -> RunConfig:
    """Raises InputError where there is no run, or it is not done."""
    config = files.open_run(folder)
    if not files.is_done(folder):
        raise InputError(f"{folder}: the run is not done", hint=f"go on with: monkeyjump train {folder} --resume")
    return config


def questions_of(config: RunConfig, tasks: Sequence[str] = (), limit: int | None = None) -> list[Questions]:
    """The test rows of a run, or of other tasks, drawn as the run's data section says."""
    data = config.data.model_copy(update={"tasks": list(tasks)}) if tasks else config.data
    loaded = load_tasks(data)
    place = place_of(config.model)
    prompts = prompts_for([one.task for one in loaded], place, config.data.max_length)
    numbers = {task.name: number for number, task in enumerate(describe(config.data))}  # as in training
    return [
        Questions(one.task, one.test.take(slice(limit)), prompts, numbers.get(one.task.name, number))
        for number, one in enumerate(loaded)
    ]


def load_adapted(config: RunConfig, folder: Path, place: str) -> PeftModel:
    """The base model with the run's adapter. Raises InputError for a damaged or unfitting one."""
    import monkeyjump  # noqa: F401  registers the adapter types with PEFT

    adapter = folder / files.ADAPTER
    if (adapter / MANIFEST).is_file():
        verify_manifest(adapter)
    try:
        return PeftModel.from_pretrained(load(config.model, place), adapter).eval()
    except (ValueError, OSError) as error:
        raise InputError(f"{adapter}: cannot be loaded: {error}", hint="copy it again, or train it anew") from error


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


def _adapter_sum(folder: Path) -> str:
    weights = folder / files.ADAPTER / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise InputError(f"{weights}: missing", hint=f"train the run again: monkeyjump train {folder} --resume")
    return sha256_of(weights)


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

"""The demo, step by step: get, say, train, compare, save, reload."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from monkeyjump import CenterUpdate, MonkeyJumpConfig, describe_routing, initialize_centers, record_routing

from ..evaluation import (
    Correct,
    Spread,
    accuracy,
    accuracy_table,
    evaluate,
    paired_difference,
    routing_table,
    spread,
)
from ..evaluation.choices import differ_at_first
from ..tasks import Collator, LoadedTask, Mixture, TestSet, find_task, load_task, mix
from ..tasks.cache import write_in_one_piece
from ..tasks.errors import InputError
from ..tasks.loading import SizeName
from ..tasks.models import DEMO_MODEL, check_model, demo_model, load_base, load_tokenizer
from ..training import Step, TrainSettings, save_adapter, train
from ..training.reload import Reloaded, check_reload
from .screen import Screen, duration

UNTOUCHED, LORA, ROUTED = "untouched", "LoRA", "MJ-LoRA"
ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
CENTER_TOKENS = 4_000
PACE_STEPS = 3  # steps of training after which the duration of the rest is known well enough
EVAL_BATCH = 16
RELOAD_SECONDS = 15.0


@dataclass(frozen=True)
class DemoOptions:
    model: str | None
    tasks: tuple[str, ...]
    size: SizeName
    output: Path
    seed: int


@dataclass(frozen=True)
class Inputs:
    """What all three models share."""

    base: str
    tokenizer: Any
    collator: Collator
    tasks: list[LoadedTask]
    mixture: Mixture
    settings: TrainSettings

    @property
    def steps(self) -> int:
        return self.settings.steps(len(self.mixture.train))

    @property
    def test_tokens(self) -> int:
        return sum(test.tokens * _forwards(test) for test in self.mixture.tests)


def run_demo(options: DemoOptions) -> None:
    """Raises InputError for bad input, before any long work."""
    _quiet()
    screen = Screen()
    _check_output(options.output)
    with screen.phase("data and model"):
        inputs = _gather(options, screen)
    targets = _say_plan(inputs, options, screen)
    results: dict[str, Correct] = {}
    with screen.phase("evaluate untouched"):
        results[UNTOUCHED] = _evaluate(UNTOUCHED, load_base(inputs.base), inputs, screen)
    lora = _fresh(inputs, options.seed, LoraConfig(**ADAPTER, target_modules=targets))
    with screen.phase("train LoRA"):
        _train(LORA, lora, inputs, screen, estimate=True)
    with screen.phase("evaluate LoRA"):
        results[LORA] = _evaluate(LORA, lora, inputs, screen)
    del lora
    routed = _fresh(inputs, options.seed, _routed_config())
    _train_routed(routed, inputs, options.seed, screen)
    spreads: dict[str, Spread] = {}
    with screen.phase("evaluate MJ-LoRA"):
        results[ROUTED] = _evaluate(ROUTED, routed, inputs, screen, spreads)
    _show(results, spreads, screen)
    with screen.phase("save and reload"):
        reloaded = _save_and_reload(routed, inputs, options.output, screen)
    _write_results(options, results, spreads, reloaded)
    screen.say(f"\n{screen.summary()}")


def _quiet() -> None:
    """Progress is shown by us; the libraries keep to errors."""
    warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by names about to go
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output: {folder} is not writable", hint="choose another folder")


def _gather(options: DemoOptions, screen: Screen) -> Inputs:
    """Everything that can be wrong with the input comes up here."""
    descriptions = [find_task(name) for name in options.tasks]
    if options.model is not None:
        check_model(options.model)
    tasks = [load_task(task, options.size, options.seed, screen.note) for task in descriptions]
    base = options.model or str(demo_model(screen.note))
    tokenizer = load_tokenizer(base)
    settings = TrainSettings(seed=options.seed)
    return Inputs(base, tokenizer, Collator.of(tokenizer), tasks, mix(tasks, tokenizer), settings)


def _routed_config() -> Any:
    return MonkeyJumpConfig(base="lora", **ADAPTER, target_modules=None)


def _fresh(inputs: Inputs, seed: int, config: Any) -> Any:
    """A newly read base with an adapter drawn from `seed`: no run sees what another left behind."""
    transformers.set_seed(seed)
    return get_peft_model(load_base(inputs.base), config)


def _say_plan(inputs: Inputs, options: DemoOptions, screen: Screen) -> list[str]:
    """Prints what is going to happen; returns the modules that get adapters, for plain LoRA too."""
    name = options.model or DEMO_MODEL
    try:
        model = _fresh(inputs, options.seed, _routed_config())
    except ValueError as error:  # our settings are fixed: it is the model that they do not fit
        raise InputError(f"model: '{name}' cannot be routed: {error}", hint="try a decoder such as Llama") from error
    plan = describe_routing(model)
    screen.say(f"Model: {name} ({plan.total_parameters - plan.trainable_parameters:,} parameters)")
    tests = {test.name: test for test in inputs.mixture.tests}
    for loaded in inputs.tasks:
        dropped = "; ".join(f"{n} {reason}" for reason, n in loaded.dropped.items() if n) or "none"
        task = loaded.task.name
        overlap = f", {n} of them dropped: also in test" if (n := inputs.mixture.overlap[task]) else ""
        screen.say(
            f"Task {task}: {len(loaded.train)} training rows{overlap}, {len(tests[task].prompts)} test rows, "
            f"{len(loaded.task.choices)} choices; {inputs.mixture.cut[task]} texts cut to "
            f"{loaded.task.max_text_tokens} tokens; dropped from the source: {dropped}"
        )
    screen.say(f"Plan: {plan}")
    settings = inputs.settings
    screen.say(
        f"k-means over up to {CENTER_TOKENS:,} tokens sets the centers; then {inputs.steps} steps of "
        f"{settings.batch_size} rows from all tasks at once, learning rate {settings.learning_rate:g}, "
        f"for plain LoRA and for MJ-LoRA alike.\n"
    )
    targets: Any = model.peft_config["default"].target_modules
    return sorted(targets)


def _forwards(test: TestSet) -> int:
    """Passes over each prompt: one where the first tokens tell the choices apart."""
    return 1 if differ_at_first(test.choices) else len(test.choices)


def _evaluate(
    name: str, model: Any, inputs: Inputs, screen: Screen, spreads: dict[str, Spread] | None = None
) -> Correct:
    """With `spreads`, the routing of each task is recorded during the same forwards."""

    @contextmanager
    def recorded(task: str) -> Any:
        assert spreads is not None
        with record_routing(model) as record:
            yield
        spreads[task] = spread(record.counts, record.slots)

    with screen.bar(f"evaluate {name}", inputs.test_tokens) as bar:
        options: dict[str, Any] = {} if spreads is None else {"around": recorded}
        return evaluate(model, inputs.mixture.tests, inputs.collator, EVAL_BATCH, bar.advance, **options)


def _train(
    name: str,
    model: Any,
    inputs: Inputs,
    screen: Screen,
    callbacks: Sequence[TrainerCallback] = (),
    estimate: bool = False,
) -> None:
    with screen.bar(f"train {name}", inputs.steps) as bar:

        def report(step: Step) -> None:
            bar.advance(1, f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s")
            if estimate and step.number == PACE_STEPS:
                screen.note(f"Expected in all: about {duration(_expected(step, inputs, screen))}")

        result = train(model, inputs.mixture.train, inputs.collator, inputs.settings, callbacks, report)
    last = result.losses[-5:]
    screen.say(
        f"{name}: {result.steps} steps, {result.tokens:,} tokens in {duration(result.seconds)} "
        f"({result.tokens / result.seconds:.0f} tokens/s), mean loss of the last {len(last)} steps "
        f"{sum(last) / len(last):.3f}"
    )


def _expected(step: Step, inputs: Inputs, screen: Screen) -> float:
    """Total seconds, from the pace of the untouched evaluation and of the first training steps."""
    evaluation = screen.phases["evaluate untouched"]
    training = step.seconds / step.number
    centers = evaluation * CENTER_TOKENS / inputs.test_tokens
    rest = (2 * inputs.steps - step.number) * training + 2 * evaluation + centers + RELOAD_SECONDS
    return screen.elapsed + rest


def _train_routed(model: Any, inputs: Inputs, seed: int, screen: Screen) -> None:
    rows = inputs.mixture.train
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [rows[i] for i in order]  # a reading that stops early has seen all tasks
    loader: Any = DataLoader(shuffled, batch_size=8, collate_fn=inputs.collator)  # type: ignore[arg-type]
    with screen.phase("initialize centers"):
        initialize_centers(model, loader, max_tokens=CENTER_TOKENS, seed=seed, progress=screen.err.is_terminal)
    with screen.phase("train MJ-LoRA"):
        _train(ROUTED, model, inputs, screen, [CenterUpdate(every=2, until=0.6)])


def _show(results: dict[str, Correct], spreads: dict[str, Spread], screen: Screen) -> None:
    screen.out.print()
    screen.out.print(accuracy_table(results, LORA, ROUTED))
    screen.say(
        "Intervals cover the choice of test rows, not of seeds: each model was trained once. 'Not resolved': "
        "the interval of the difference covers 0, so these rows do not tell which is better.\n"
    )
    screen.out.print(routing_table(spreads))
    screen.say("Averaged over the blocks; the last column is 1 where each block sends the whole task to one adapter.")


def _save_and_reload(model: Any, inputs: Inputs, output: Path, screen: Screen) -> Reloaded:
    folder = output / "adapter"
    save_adapter(model, folder)
    test, loaded = inputs.mixture.tests[0], inputs.tasks[0]
    batch = inputs.collator([{"input_ids": prompt, "attention_mask": [1] * len(prompt)} for prompt in test.prompts[:4]])
    reloaded = check_reload(model, inputs.base, folder, batch, test.prompts[0])
    same = "bit for bit equal" if reloaded.equal else "NOT equal"
    screen.say(f"\nSaved {folder}; reloaded in a new process on a fresh base: {reloaded.values:,} logits {same}")
    screen.say(f"(largest difference {reloaded.difference:g}). Asked there, with the adapter:")
    question = loaded.task.instruction.format(**test.examples[0].fields)
    screen.say(f"  {question.strip()[:300]}")
    screen.say(f"  -> {reloaded.answer!r} (right: {loaded.task.choices[test.answers[0]]!r})")
    if not reloaded.equal:
        raise RuntimeError(f"{folder} does not give the logits of the model it was saved from")
    return reloaded


def _write_results(
    options: DemoOptions, results: dict[str, Correct], spreads: dict[str, Spread], reloaded: Reloaded
) -> None:
    """results.json: every number of the tables, and the right and wrong of each test row."""
    tasks = list(results[ROUTED])
    record = {
        "options": {**asdict(options), "output": str(options.output)},
        "accuracy": {
            model: {task: asdict(accuracy(rows)) for task, rows in correct.items()}
            for model, correct in results.items()
        },
        "difference": {task: asdict(paired_difference(results[LORA][task], results[ROUTED][task])) for task in tasks},
        "correct": results,
        "routing": {task: asdict(found) for task, found in spreads.items()},
        "reload": asdict(reloaded),
    }
    write_in_one_piece(options.output / "results.json", json.dumps(record, indent=1))

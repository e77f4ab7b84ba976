"""The demo, step by step: get, say, train, compare, save, reload."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from monkeyjump import CenterUpdate, MonkeyJumpConfig, describe_routing, initialize_centers, record_routing
from monkeyjump.cli.demo_inputs import DemoOptions, Inputs, gather
from monkeyjump.cli.demo_report import LORA, ROUTED, UNTOUCHED, say_plan, show_results, write_results
from monkeyjump.cli.screen import Screen, duration
from monkeyjump.evaluation import Correct, Spread, evaluate, spread
from monkeyjump.tasks import InputError
from monkeyjump.tasks.models import load_base
from monkeyjump.training import Step, save_adapter, train
from monkeyjump.training.reload import Reloaded, check_reload

ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
CENTER_TOKENS = 4_000
PACE_STEPS = 3  # steps of training after which the duration of the rest is known well enough
EVAL_BATCH = 16
RELOAD_SECONDS = 15.0


def run_demo(options: DemoOptions) -> None:
    """Raises InputError for bad input, before any long work."""
    _quiet()
    screen = Screen()
    with screen.phase("data and model"):
        inputs = gather(options, screen)
        targets = _plan(inputs, options, screen)
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
    show_results(results, spreads, screen)
    with screen.phase("save and reload"):
        reloaded = _save_and_reload(routed, inputs, options.output, screen)
    write_results(options, results, spreads, reloaded)
    screen.say(f"\n{screen.summary()}")


def _quiet() -> None:
    """Progress is shown by us; the libraries keep to errors."""
    warnings.simplefilter("ignore", FutureWarning)  # peft calls transformers by names about to go
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _routed_config() -> Any:
    return MonkeyJumpConfig(base="lora", **ADAPTER, target_modules=None)


def _fresh(inputs: Inputs, seed: int, config: Any) -> Any:
    """A newly read base with an adapter drawn from `seed`: no run sees what another left behind."""
    base = load_base(inputs.base)
    transformers.set_seed(seed)
    try:
        return get_peft_model(base, config)
    except ValueError as error:  # our settings are fixed: it is the model that they do not fit
        reason = f"model: '{inputs.base}' cannot take the adapters: {error}"
        raise InputError(reason, hint="try a decoder such as Llama") from error


def _plan(inputs: Inputs, options: DemoOptions, screen: Screen) -> list[str]:
    """Says what is going to happen; returns the modules that get adapters, for plain LoRA too."""
    model = _fresh(inputs, options.seed, _routed_config())
    say_plan(describe_routing(model), inputs, options, CENTER_TOKENS, screen)
    targets: Any = model.peft_config["default"].target_modules
    return sorted(targets)


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

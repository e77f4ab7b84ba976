"""The demo, step by step: get, say, train, compare, save, reload."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monkeyjump import describe_routing, record_routing
from monkeyjump.cli.demo_inputs import DemoOptions, Inputs, gather
from monkeyjump.cli.demo_report import LORA, ROUTED, UNTOUCHED, say_plan, show_results, write_results
from monkeyjump.cli.quiet import quiet
from monkeyjump.cli.screen import Screen, duration
from monkeyjump.evaluation import Correct, Spread, answer, spread
from monkeyjump.training import Watch, fit, save_adapter
from monkeyjump.training.building import build_model, start_centers
from monkeyjump.training.callbacks import Step
from monkeyjump.training.models import load
from monkeyjump.training.reload import Reloaded, check_reload
from monkeyjump.training.signals import Interrupted, Interrupts

PACE_STEPS = 3  # steps of training after which the duration of the rest is known well enough
EVAL_BATCH = 16
RELOAD_SECONDS = 15.0


def run_demo(options: DemoOptions) -> None:
    """Raises InputError for bad input, before any long work."""
    quiet()
    screen = Screen()
    with Interrupts("interrupted") as interrupts, tempfile.TemporaryDirectory(prefix="monkeyjump-demo-") as scratch:
        with screen.phase("data and model"):
            inputs = gather(options, screen)
            say_plan(describe_routing(_fresh(inputs, routed=True)), inputs, options, screen)
        _compare(options, inputs, Path(scratch), interrupts, screen)


def _compare(options: DemoOptions, inputs: Inputs, scratch: Path, interrupts: Interrupts, screen: Screen) -> None:
    results: dict[str, Correct] = {}
    with screen.phase("evaluate untouched"):
        results[UNTOUCHED] = _evaluate(UNTOUCHED, load(inputs.config.model, inputs.base), inputs, screen)
    lora = _fresh(inputs, routed=False)
    with screen.phase("train LoRA"):
        _train(LORA, lora, inputs, scratch, interrupts, screen, estimate=True)
    with screen.phase("evaluate LoRA"):
        results[LORA] = _evaluate(LORA, lora, inputs, screen)
    del lora
    routed = _fresh(inputs, routed=True)
    with screen.phase("initialize centers"):
        centers = inputs.config.method.centers
        start_centers(routed, inputs.data.train, inputs.collate, centers, screen.err.is_terminal)
    with screen.phase("train MJ-LoRA"):
        _train(ROUTED, routed, inputs, scratch, interrupts, screen)
    spreads: dict[str, Spread] = {}
    with screen.phase("evaluate MJ-LoRA"):
        results[ROUTED] = _evaluate(ROUTED, routed, inputs, screen, spreads)
    show_results(results, spreads, screen)
    with screen.phase("save and reload"):
        reloaded = _save_and_reload(routed, inputs, options.output, screen)
    write_results(options, results, spreads, reloaded)
    screen.say(f"\n{screen.summary()}")


def _fresh(inputs: Inputs, routed: bool) -> Any:
    """A newly read base with an adapter drawn from the seed; both methods adapt the same modules."""
    method = inputs.config.method.model_copy(update={"routed": routed})
    config = inputs.config.model_copy(update={"method": method})
    return build_model(config, inputs.base, inputs.steps)


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
        answers = answer(model, inputs.tests, inputs.collate.inner, EVAL_BATCH, bar.advance, **options)
        return {task.name: task.correct for task in answers}


def _train(
    name: str,
    model: Any,
    inputs: Inputs,
    scratch: Path,
    interrupts: Interrupts,
    screen: Screen,
    estimate: bool = False,
) -> None:
    with screen.bar(f"train {name}", inputs.steps) as bar:

        def report(step: Step) -> None:
            bar.advance(1, f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s")
            if estimate and step.number == PACE_STEPS:
                screen.note(f"Expected in all: about {duration(_expected(step, inputs, screen))}")

        train, centers = inputs.config.train, inputs.config.method.centers
        names = inputs.data.names
        watch = Watch(report=report, where=inputs.data.train.where, interrupts=interrupts)
        result = fit(model, inputs.data.train, inputs.collate, train, centers, names, scratch / "trainer", watch)
    if interrupts.received:
        raise Interrupted("interrupted", interrupts.received)
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
    centers = evaluation * (inputs.config.method.centers.max_tokens or 0) / inputs.test_tokens
    rest = (2 * inputs.steps - step.number) * training + 2 * evaluation + centers + RELOAD_SECONDS
    return screen.elapsed + rest


def _save_and_reload(model: Any, inputs: Inputs, output: Path, screen: Screen) -> Reloaded:
    folder = output / "adapter"
    save_adapter(model, folder)
    loaded, first = inputs.data.tasks[0], inputs.tests[0]
    prompts = [first[row].inputs["input_ids"] for row in range(min(4, len(first)))]
    batch = inputs.collate.inner([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in prompts])
    reloaded = check_reload(model, inputs.base, folder, batch, prompts[0])
    same = "bit for bit equal" if reloaded.equal else "NOT equal"
    screen.say(f"\nSaved {folder}; reloaded in a new process on a fresh base: {reloaded.values:,} logits {same}")
    screen.say(f"(largest difference {reloaded.difference:g}). Asked there, with the adapter:")
    question = loaded.task.instruction.format(**loaded.test[0].fields)
    screen.say(f"  {question.strip()[:300]}")
    screen.say(f"  -> {reloaded.answer!r} (right: {loaded.test[0].gold[0]!r})")
    if not reloaded.equal:
        raise RuntimeError(f"{folder} does not give the logits of the model it was saved from")
    return reloaded

"""What the demo says: its plan, its tables, and results.json."""

from __future__ import annotations

import json
from dataclasses import asdict

from monkeyjump.cli.demo_inputs import DemoOptions, Inputs
from monkeyjump.cli.screen import Screen
from monkeyjump.evaluation import Correct, Spread, accuracy, accuracy_table, paired_difference, routing_table
from monkeyjump.tasks import LoadedTask
from monkeyjump.tasks.cache import write_in_one_piece
from monkeyjump.tasks.models import DEMO_MODEL
from monkeyjump.training.data import RunData
from monkeyjump.training.reload import Reloaded
from monkeyjump.tuner.inspect import RoutingPlan

UNTOUCHED, LORA, ROUTED = "untouched", "LoRA", "MJ-LoRA"


def say_plan(plan: RoutingPlan, inputs: Inputs, options: DemoOptions, screen: Screen) -> None:
    frozen = plan.total_parameters - plan.trainable_parameters
    screen.say(f"Model: {options.model or DEMO_MODEL} ({frozen:,} parameters)")
    for loaded in inputs.data.tasks:
        _say_task(loaded, inputs.data, screen)
    screen.say(f"Plan: {plan}")
    train, centers = inputs.config.train, inputs.config.method.centers
    screen.say(
        f"k-means over up to {centers.max_tokens:,} tokens sets the centers; then {inputs.steps} steps of "
        f"{train.batch_size} rows from all tasks at once, learning rate {train.learning_rate:g}, "
        f"for plain LoRA and for MJ-LoRA alike.\n"
    )


def _say_task(loaded: LoadedTask, data: RunData, screen: Screen) -> None:
    task = loaded.task
    dropped = "; ".join(f"{count} {reason}" for reason, count in data.dropped(loaded).items()) or "none"
    screen.say(
        f"Task {task.name}: {data.train.blend.rows[task.name]} training rows, {len(loaded.test)} test rows, "
        f"{len(task.choices)} choices; {data.prompts.cut[task.name]} training texts cut to {task.max_text_tokens} "
        f"tokens; dropped: {dropped}"
    )


def show_results(results: dict[str, Correct], spreads: dict[str, Spread], screen: Screen) -> None:
    screen.out.print()
    screen.out.print(accuracy_table(results, LORA, ROUTED))
    screen.say(
        "Intervals cover the choice of test rows, not of seeds: each model was trained once. 'Not resolved': "
        "the interval of the difference covers 0, so these rows do not tell which is better.\n"
    )
    screen.out.print(routing_table(spreads))
    screen.say("Averaged over the blocks; the last column is 1 where each block sends the whole task to one adapter.")


def write_results(
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

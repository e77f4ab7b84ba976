"""What a run would do, found out before it does it.

    config.json alone       blocks, projections, parameters; memory from shapes
    and a tokenizer         rows per task, dropped rows, sample prompts with the mask of the loss
    and weights             tokens per expert after a small k-means; a probe step; memory measured on a batch

Anything that would make the run silently do nothing is a problem, and a plan with problems is a failure.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from monkeyjump import record_routing
from monkeyjump.bench.memory import saved_bytes
from monkeyjump.evaluation.routing import spread
from monkeyjump.tasks import Collator, InputError
from monkeyjump.training.adapters import adapter_config, add_adapter
from monkeyjump.training.arguments import check_machine, total_steps
from monkeyjump.training.building import batches, build_model, needs_centers, start_centers
from monkeyjump.training.config import RunConfig
from monkeyjump.training.coverage import Coverage, coverage, missed_names
from monkeyjump.training.data import RunCollator, RunData, prepare
from monkeyjump.training.estimate import Estimate, estimate
from monkeyjump.training.models import has_tokenizer, has_weights, model_config, place_of, skeleton
from monkeyjump.training.probe import Probe, forward, probe
from monkeyjump.training.subject import base_of, load_adapter_config

PROBE_BATCHES = 16
CHECKED_ROWS = 20_000
CENTER_TOKENS = 4096
COLLAPSED = 1.5  # adapters in effective use below which a block counts as collapsed (F41)
Say = Callable[[str], None]


@dataclass
class Sample:
    """One training row of a task as the model sees it: (text, supervised) pieces."""

    task: str
    tokens: int
    supervised: int
    pieces: list[tuple[str, bool]]


@dataclass
class Experts:
    """A block's tokens per routed adapter; `effective`: exp of the entropy of their shares."""

    block: str
    tokens: dict[str, int]
    effective: float


@dataclass
class Plan:
    """`left_out`: what could not be looked at, and why."""

    coverage: Coverage | None = None
    estimate: Estimate | None = None
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int | None = None
    samples: list[Sample] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    probe: Probe | None = None
    missed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found, cost = self.coverage, self.estimate
        return {
            "trainable_parameters": found.trainable_parameters if found else 0,
            "total_parameters": found.total_parameters if found else 0,
            "routed": found.routed if found else [],
            "shared": found.shared if found else [],
            "plain": list(found.plain) if found else [],
            "missed": self.missed,
            "adapted_modules": len(found.adapted) if found else 0,
            "blocks": [asdict(block) for block in found.blocks] if found else [],
            "rows": self.rows,
            "steps": self.steps,
            "memory": {**asdict(cost), "total": cost.memory} if cost else None,
            "samples": [asdict(sample) for sample in self.samples],
            "experts": [asdict(block) for block in self.experts],
            "probe": asdict(self.probe) if self.probe else None,
            "problems": self.problems,
            "warnings": self.warnings,
            "left_out": self.left_out,
        }


def make_plan(config: RunConfig, parameters_only: bool = False, say: Say = lambda text: None) -> Plan:
    """Raises InputError for input that cannot even be planned with; writes nothing that stays."""
    check_machine(config.train)
    plan = Plan()
    place = place_of(config.model, say)
    base_config = model_config(config.model, place)
    base = skeleton(config.model, place)
    numbers = [str(number) for number in range(len(config.data.tasks))]  # how many there are is all that counts here
    skeletal = _plan_parameters(plan, base, adapter_config(config.method, base, tasks=numbers), place)
    data = None if parameters_only else _plan_data(plan, config, place, say)
    tokens = config.train.batch_size * (data.checked.longest if data else config.data.max_length)
    kept = None
    if parameters_only:
        plan.left_out.append("data, experts and probe step: not asked for")
    elif data and not has_weights(place):
        plan.left_out.append(f"experts and probe step: {place} has no weights")
    elif data and not plan.problems:
        say("loading the weights")
        kept = _plan_steps(plan, config, place, data, say)
    if skeletal is not None:
        plan.estimate = estimate(skeletal, base_config, config.train, tokens, kept)
        _check_disk(plan, config)
    return plan


def plan_adapter(folder: Path, model: str | None = None, say: Say = lambda text: None) -> Plan:
    """What the adapter in a folder adapts, from its config and that of its base model alone. Raises InputError."""
    plan = Plan(left_out=["data, experts and probe step: an adapter's folder says its parameters alone"])
    base_model = base_of(folder, model)
    place = place_of(base_model, say)
    config = load_adapter_config(folder)
    _plan_parameters(plan, skeleton(base_model, place), config, place)
    return plan


def _plan_parameters(plan: Plan, base: Any, adapter: PeftConfig, place: str) -> Any:
    """The adapted skeleton; None where nothing could be adapted, which is a problem."""
    plan.missed = missed_names(base, vars(adapter))
    if plan.missed:
        plan.problems.append(f"matches no module of the model: {', '.join(plan.missed)}")
    try:
        model = add_adapter(base, adapter, place)
        plan.coverage = coverage(model)
    except ValueError as error:  # also InputError: what it names is in its text
        plan.problems.append(str(error))
        return None
    for name, (having, total) in plan.coverage.uneven.items():
        plan.warnings.append(f"{name} is adapted in {having} of {total} blocks")
    if not plan.coverage.trainable_parameters:
        plan.problems.append("no parameter trains")
    if plan.coverage.blocks and plan.coverage.plain:
        plan.warnings.append(
            f"{len(plan.coverage.plain)} adapted modules lie outside routed blocks, such as {plan.coverage.plain[0]}"
        )
    return model


def _plan_data(plan: Plan, config: RunConfig, place: str, say: Say) -> RunData | None:
    if not has_tokenizer(place):
        plan.left_out.append(f"data: {place} has no tokenizer")
        return None
    data = prepare(config.data, place, say, checked=CHECKED_ROWS)
    for number, loaded in enumerate(data.tasks):
        name = loaded.task.name
        plan.rows[name] = {
            "train": data.train.blend.rows[name],
            "available": len(loaded.train) - data.train.blend.overlap[name],
            "test": len(loaded.test),
            "cut": data.prompts.cut[name],
            "dropped": data.dropped(loaded),
        }
        plan.samples.append(_sample(data, int((data.train.tasks == number).argmax())))
    if data.checked.rows < len(data.train):
        plan.warnings.append(f"{data.checked.rows:,} of {len(data.train):,} training rows were encoded and looked at")
    plan.steps = total_steps(config.train, len(data.train))
    return data


def _sample(data: RunData, number: int) -> Sample:
    row, tokenizer = data.train[number], data.prompts.tokenizer
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(row["input_ids"], row["labels"]):
        supervised = label >= 0
        if not pieces or pieces[-1][1] != supervised:
            pieces.append(([], supervised))
        pieces[-1][0].append(token)
    texts = [(tokenizer.decode(ids, skip_special_tokens=False), supervised) for ids, supervised in pieces]
    supervised = sum(label >= 0 for label in row["labels"])
    return Sample(data.names[row["task_ids"]], len(row["input_ids"]), supervised, texts)


def _plan_steps(plan: Plan, config: RunConfig, place: str, data: RunData, say: Say) -> int:
    """Centers, tokens per expert, gradients; returns the bytes that the batch with the longest row keeps."""
    model = build_model(config, place, plan.steps)
    collate = RunCollator(Collator.of(data.prompts.tokenizer))
    small = config.method.centers.model_copy(update={"max_tokens": CENTER_TOKENS, "restarts": 1})
    if needs_centers(model):
        say(f"k-means over {CENTER_TOKENS:,} tokens")
        start_centers(model, data.train, collate, small)
    if plan.coverage and plan.coverage.blocks:
        _plan_experts(plan, model, data, collate, config)
    say("probe step")
    size = config.train.batch_size
    longest = [data.train[data.checked.longest_row], *(data.train[i] for i in range(min(size - 1, len(data.train))))]
    found = [collate(longest)]
    for number, batch in enumerate(batches(data.train, collate, config.train.seed, size)):
        if number == PROBE_BATCHES:
            break
        found.append(batch)
    plan.probe = probe(model, found, config.train.precision)
    plan.problems += plan.probe.problems()
    return _kept(model, found[0], config)


def _kept(model: Any, batch: dict[str, Any], config: RunConfig) -> int:
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.train()

    def loss() -> Tensor:
        return forward(model, batch, config.train.precision).loss

    return saved_bytes(model, loss)


def _plan_experts(plan: Plan, model: Any, data: RunData, collate: Any, config: RunConfig) -> None:
    seen = 0
    model.eval()
    with torch.no_grad(), record_routing(model) as record:
        for batch in batches(data.train, collate, config.method.centers.seed):
            forward(model, batch, config.train.precision)
            seen += int(batch["attention_mask"].sum())
            if seen >= CENTER_TOKENS:
                break
    for block, counts in record.counts.items():
        slots = record.slots[block]
        effective = spread({block: counts}, {block: slots}).effective
        tokens = dict(zip(slots, (int(count) for count in counts)))
        plan.experts.append(Experts(block, tokens, effective))
        idle = [slot for slot, count in tokens.items() if not count]
        if idle:
            plan.warnings.append(f"{block}: no token reaches {', '.join(idle)}")
        elif effective < COLLAPSED:
            plan.warnings.append(f"{block}: {effective:.2f} adapters in effective use of {len(slots)}")


def _check_disk(plan: Plan, config: RunConfig) -> None:
    assert plan.estimate is not None
    folder = next(path for path in (config.output.folder.absolute(), *config.output.folder.absolute().parents)
                  if path.exists())  # fmt: skip
    free = shutil.disk_usage(folder).free
    if free < plan.estimate.disk:
        plan.problems.append(
            f"output.folder: {folder} has {free / 2**20:.0f} MiB free, the run needs about "
            f"{plan.estimate.disk / 2**20:.0f} MiB"
        )


def refuse(plan: Plan) -> None:
    """Raises InputError where a plan has problems; for commands that go on after planning."""
    if plan.problems:
        raise InputError("; ".join(plan.problems), hint="`monkeyjump plan` shows more")

"""Orders, learned masks and allocations of adapters on a pretrained Mamba, against what they must beat.

    python benchmarks/mamba_pruning.py MODEL --text valid.txt --held-out test.txt --output FOLDER
        [--steps 60] [--seeds 5] [--adapt-text news.txt --adapt-held-out other.txt] [--only orders,masks,allocation]

orders      channels removed in blocks of 16 neighbors, chosen by Taylor scores, after each order: as cut, after
            least-squares repair, and after that and `steps` of fine-tuning
masks       the same number of single channels removed, `steps` of training in all: one-shot Taylor scores, then
            fine-tuning, against learned masks for a share of the steps, then fine-tuning of what they keep
allocation  adapters of an equal number of parameters, `steps` of training: hybrid against the others. On
            --adapt-text the dense model learns new text; without it, the model cut by Taylor scores recovers.

Every arm of a seed sees the same calibration batches and the same training windows, and is scored on the same
held-out tokens: differences are paired over seeds. The model is one and the held-out text is one, so intervals are
over calibration, training data and random choices, not over pretraining. Results are appended to results.jsonl, one
line an arm; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from monkeyjump.allocation import (
    PeftPlan,
    adaptable_modules,
    adapter_parameters,
    allocate_peft,
    attach_peft,
    shuffled,
    taylor_importance,
    uniform_peft,
)
from monkeyjump.evaluation.results import over_seeds
from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.order.order import METHODS
from monkeyjump.mamba.selection import select_kept
from monkeyjump.mamba.shrink import repair, shrink
from monkeyjump.mamba.text_runs.windows import Windows, collate, encode
from monkeyjump.mamba.texts import read_documents

Batch = dict[str, Tensor]
Record = dict[str, Any]
REFERENCE = {"orders": "random", "masks": "one-shot Taylor", "allocation": "hybrid"}
MASKS = ("one-shot Taylor", "learned, from Taylor scores", "learned, from even gates")
ALLOCATIONS = ("hybrid", "uniform LoRA", "uniform IA3", "LoRA on x_proj and dt_proj", "shuffled scores")
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")  # conv1d is a [D, 4] matrix: no rank to spend a budget on
CALIBRATION, TUNING = 1_000_003, 999  # seeds apart from those of training


class Bench:
    """The dense model and the texts; `options` as in the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.dense = patch_mamba(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)).eval()
        self.text, self.held_out = self._stream(options.text), self._stream(options.held_out)
        self.adapting = bool(options.adapt_text)
        self.new_text = self._stream(options.adapt_text) if self.adapting else self.text
        self.new_held_out = self._stream(options.adapt_held_out) if self.adapting else self.held_out

    def _stream(self, names: list[str]) -> Any:
        return encode(self.tokenizer, read_documents(names).texts)

    def batches(self, stream: Any, seed: int, count: int) -> list[Batch]:
        """`count` batches of windows, a function of the seed."""
        size = self.options.batch_size
        windows = Windows(stream, self.options.length, count * size, seed)
        made = [collate(windows[n * size + i] for i in range(size)) for n in range(count)]
        return [{name: values for name, values in batch.items() if name != "row_ids"} for batch in made]

    def calibration(self, stream: Any, seed: int) -> list[Batch]:
        return self.batches(stream, CALIBRATION + seed, self.options.calibration)

    @torch.no_grad()
    def loss(self, model: Any, stream: Any, skip: int = 0) -> float:
        """Nats per token over the first held-out tokens after `skip`, in windows of the training length."""
        stream = stream[skip:]
        length, size = self.options.length, 4 * self.options.batch_size
        rows = min(self.options.eval_tokens, len(stream) - 1) // length
        ids = torch.from_numpy(stream[: rows * length + 1].astype("int64"))
        inputs, targets = ids[:-1].view(rows, length), ids[1:].view(rows, length)
        model.eval()
        total = 0.0
        for inputs_of, targets_of in zip(inputs.split(size), targets.split(size)):
            logits = model(input_ids=inputs_of, use_cache=False).logits
            total += cross_entropy(logits.flatten(0, 1).float(), targets_of.flatten(), reduction="sum").item()
        return total / (rows * length)

    def rate(self, step: int) -> float:
        """Share of the learning rate: linear warmup, then a cosine, over all steps of an arm."""
        steps = self.options.steps
        warmup = max(1, round(0.05 * steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def train(self, model: Any, batches: list[Batch], lr: float, first: int = 0, masks: Any = None) -> None:
        """Steps `first`, `first + 1`, ... of an arm, on `batches`; new moments, the schedule goes on."""
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        if masks is not None:
            groups = masks.parameter_groups(model, self.options.gate_rate)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step: self.rate(first + step), *[lambda step: 1.0] * (len(groups) - 1)]
        )
        model.train()
        for step, batch in enumerate(batches):
            if masks is not None:
                masks.advance(step, len(batches))
            loss = model(**batch).loss
            (loss if masks is None else loss + masks.penalty()).backward()
            torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def cut(self, seed: int) -> Any:
        """The model without the channels of the lowest Taylor scores."""
        model = copy.deepcopy(self.dense)
        groups = channel_groups(model)
        scores = channel_importance(model, self.calibration(self.text, seed), groups)
        return shrink(model, select_kept(groups, scores, self.options.sparsity, scope=self.options.scope))


def orders(bench: Bench, method: str, seed: int) -> Record:
    options, calibration = bench.options, bench.calibration(bench.text, seed)
    model = copy.deepcopy(bench.dense)
    order = ChannelOrder(method, seed=seed)
    order.update(model, calibration)
    groups = channel_groups(model)
    scores = channel_importance(model, calibration, groups)
    shrink(model, select_kept(groups, scores, options.sparsity, block=options.block, scope=options.scope))
    found: Record = {"as cut": bench.loss(model, bench.held_out)}
    repair(model, bench.dense, calibration)
    found["repaired"] = bench.loss(model, bench.held_out)
    bench.train(model, bench.batches(bench.text, seed, options.steps), options.learning_rate)
    found["repaired, tuned"] = bench.loss(model, bench.held_out)
    costs = [(block.cost_before, block.cost_after) for block in order.blocks if block.cost_after is not None]
    return {"loss": found, "parameters": model.num_parameters(), "path_costs": costs}


def masks(bench: Bench, arm: str, seed: int) -> Record:
    options = bench.options
    batches = bench.batches(bench.text, seed, options.steps)
    if arm == MASKS[0]:
        model, masked = bench.cut(seed), 0
        expected = None
    else:
        model, masked = copy.deepcopy(bench.dense), round(options.masked_share * options.steps)
        scores = channel_importance(model, bench.calibration(bench.text, seed), channel_groups(model))
        config = MaskConfig(target_sparsity=options.sparsity, sparsity_weight=options.sparsity_weight, seed=seed)
        learned = attach_masks(model, config, scores if arm == MASKS[1] else None)
        bench.train(model, batches[:masked], options.learning_rate, masks=learned)
        kept, expected = learned.kept(), learned.expected_sparsity().item()
        learned.remove()
        shrink(model, kept)
    found: Record = {"as cut": bench.loss(model, bench.held_out)}
    bench.train(model, batches[masked:], options.learning_rate, first=masked)
    found["tuned"] = bench.loss(model, bench.held_out)
    return {"loss": found, "parameters": model.num_parameters(), "expected_sparsity": expected}


def plan_of(bench: Bench, arm: str, model: Any, seed: int) -> PeftPlan:
    """All within the parameters of uniform LoRA of `rank`; IA³ has no rank, so its plan costs what it costs."""
    options = bench.options
    budget = uniform_peft(model, "lora", PROJECTIONS, peft_r=options.rank).parameters
    if arm == "uniform LoRA":
        return uniform_peft(model, "lora", PROJECTIONS, budget=budget)
    if arm == "uniform IA3":
        return uniform_peft(model, "ia3", PROJECTIONS)
    if arm == "LoRA on x_proj and dt_proj":
        return uniform_peft(model, "lora", only=("x_proj", "dt_proj"), budget=budget)
    modules = [name for name in adaptable_modules(model) if name.rpartition(".")[2] in PROJECTIONS]
    scores = taylor_importance(model, bench.calibration(bench.new_text, seed), modules)
    scores = shuffled(scores, seed) if arm == "shuffled scores" else scores
    return allocate_peft(model, scores, options.ratio, options.threshold, budget=budget)


def allocation(bench: Bench, arm: str, seed: int, lr: float | None = None) -> Record:
    model = copy.deepcopy(bench.dense) if bench.adapting else bench.cut(seed)
    batches = bench.batches(bench.new_text, seed, bench.options.steps)
    before = bench.loss(model, bench.new_held_out)
    plan = plan_of(bench, arm, model, seed)
    torch.manual_seed(seed)
    attach_peft(model, plan, batches[0])
    chosen = tuned_rate(bench, arm) if lr is None else lr
    bench.train(model, batches, chosen)
    skip = bench.options.eval_tokens if seed == TUNING else 0
    tuned = bench.loss(model, bench.new_held_out, skip)
    kinds = {kind: len(plan.of(kind)) for kind in ("lora", "ia3", "frozen")}  # type: ignore[arg-type]
    trained = sum(p.numel() for p in adapter_parameters(model).values())
    return {"loss": {"tuned": tuned}, "before": before, "parameters": trained, "learning_rate": chosen, **kinds}


RATES: dict[str, float] = {}


def tuned_rate(bench: Bench, arm: str) -> float:
    """The rate of `rates` that is best for this arm, with a seed and on tokens that no reported result has."""
    if arm not in RATES:
        losses = {lr: allocation(bench, arm, TUNING, lr)["loss"]["tuned"] for lr in bench.options.rates}
        RATES[arm] = min(losses, key=losses.__getitem__)
    return RATES[arm]


EXPERIMENTS: dict[str, tuple[tuple[str, ...], Callable[[Bench, str, int], Record]]] = {
    "orders": (METHODS, orders),
    "masks": (MASKS, masks),
    "allocation": (ALLOCATIONS, allocation),
}


def run(options: argparse.Namespace) -> list[Record]:
    """All results, those of earlier calls included; seeds outermost, so that a cut-off run has whole seeds."""
    path = options.output / "results.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(record["experiment"], record["arm"], record["seed"]) for record in records}
    RATES.update({r["arm"]: r["learning_rate"] for r in records if "learning_rate" in r})
    bench = Bench(options)
    for seed in range(options.seeds):
        for name in options.only:
            arms, measure = EXPERIMENTS[name]
            for arm in arms:
                if (name, arm, seed) in done:
                    continue
                start = time.perf_counter()
                found = measure(bench, arm, seed)
                record = {"experiment": name, "arm": arm, "seed": seed, **found}
                record["seconds"] = round(time.perf_counter() - start, 1)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                records.append(record)
                print(f"seed {seed} {name}: {arm}: {found['loss']} {record['seconds']} s", flush=True)
    dense = bench.loss(bench.dense, bench.held_out)
    return [{"experiment": "dense", "arm": "dense", "seed": 0, "loss": {"": dense}}, *records]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95 % Student interval; not a number of fewer than two values."""
    found = over_seeds(values)
    return found.value, found.high - found.value


def summarize(records: list[Record]) -> Iterator[Record]:
    """A line per experiment, stage and arm: the loss, and its difference to the reference of the same seeds."""
    for name, reference in REFERENCE.items():
        found = {(r["arm"], r["seed"]): r for r in records if r["experiment"] == name}
        arms = list(dict.fromkeys(arm for arm, _ in found))
        for stage in next(iter(found.values()))["loss"] if found else ():
            for arm in arms:
                of_arm = {seed: record for (other, seed), record in found.items() if other == arm}
                losses = [record["loss"][stage] for record in of_arm.values()]
                pairs = [seed for seed in of_arm if (reference, seed) in found]
                gaps = [of_arm[s]["loss"][stage] - found[reference, s]["loss"][stage] for s in pairs]
                mean, half = interval(losses)
                gap, gap_half = interval(gaps) if gaps and arm != reference else (math.nan, math.nan)
                yield {
                    "experiment": name, "stage": stage, "arm": arm, "seeds": len(losses), "loss": mean, "half": half,
                    "perplexity": math.exp(mean), "reference": reference,
                    "difference": gap, "difference_half": gap_half,
                    "parameters": sum(record["parameters"] for record in of_arm.values()) / len(of_arm),
                }  # fmt: skip


def verdict(line: Record) -> str:
    if line["arm"] == line["reference"]:
        return "reference"
    gap, half = line["difference"], line["difference_half"]
    if not math.isfinite(half):
        return "too few seeds"
    return "no effect" if abs(gap) <= half else "better" if gap < 0 else "worse"


def table(dense: float, lines: list[Record], settings: Record) -> str:
    """Markdown."""
    rows = [
        f"Dense model: {dense:.4f} nats per held-out token. "
        "Mean over seeds ± half of the 95 % Student interval; differences are paired over seeds.",
        "",
    ]
    for name in dict.fromkeys(line["experiment"] for line in lines):
        rows += [f"### {name}: difference to {REFERENCE[name]}", ""]
        rows += ["| stage | arm | seeds | parameters | loss | perplexity | difference | |", "|" + "---|" * 8]
        for line in (line for line in lines if line["experiment"] == name):
            own = line["arm"] == line["reference"]
            gap = "" if own else f"{line['difference']:+.4f} ± {line['difference_half']:.4f}"
            rows.append(
                f"| {line['stage']} | {line['arm']} | {line['seeds']} | {line['parameters']:,.0f} | "
                f"{line['loss']:.4f} ± {line['half']:.4f} | {line['perplexity']:.2f} | {gap} | {verdict(line)} |"
            )
        rows.append("")
    return "\n".join([*rows, f"Settings: {json.dumps(settings)}", ""])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder of a pretrained Mamba with its tokenizer")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held-out", nargs="+", required=True)
    parser.add_argument("--adapt-text", nargs="+", default=[])
    parser.add_argument("--adapt-held-out", nargs="+", default=[])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(EXPERIMENTS))
    numbers = {
        "seeds": 5, "steps": 60, "batch_size": 8, "length": 128, "calibration": 8, "eval_tokens": 16384, "block": 16,
        "sparsity": 0.5, "learning_rate": 1e-3, "masked_share": 0.7, "gate_rate": 0.1, "sparsity_weight": 10.0,
        "rank": 2, "ratio": 0.3, "threshold": 0.5,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3, 1e-2], help="of adapters")
    parser.add_argument("--scope", choices=("global", "layer"), default="global")
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - EXPERIMENTS.keys():
        parser.error(f"--only {', '.join(unknown)}: it takes {', '.join(EXPERIMENTS)}")
    if bool(options.adapt_text) != bool(options.adapt_held_out):
        parser.error("--adapt-text and --adapt-held-out belong together")
    return options


def check_settings(options: argparse.Namespace) -> Record:
    """What results depend on; another folder for other settings."""
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "only", "seeds")}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} holds other settings: name another --output, or repeat those")
    path.write_text(json.dumps(settings, indent=1))
    return settings


def main() -> None:
    options = parse()
    settings = check_settings(options)
    (dense, *records) = run(options)
    lines = list(summarize(records))
    summary = {"settings": settings, "dense": dense["loss"][""], "summary": lines, "records": records}
    (options.output / "pruning.json").write_text(json.dumps(summary, indent=1))
    text = table(dense["loss"][""], lines, settings)
    (options.output / "pruning.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

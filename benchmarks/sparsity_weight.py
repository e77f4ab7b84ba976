"""What the weight of the sparsity does to learned gates: the README's 1e-5 beside none and ours.

    python benchmarks/sparsity_weight.py runs/wikitext --text valid.txt [--seeds 3] [--steps 16]

Gates on a pretrained model whose weights stay as they are: channel gates from Taylor scores, the schedule of `adapt`
up to the exact choice, Adam at 0.1. Arms of a seed see the same windows and the same noise. `moved`: largest
difference of a logit to weight 0; `as without`: share of the channels kept that weight 0 keeps; the loss is that of
the cut model on windows that nothing was learned on.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor

from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.text_runs.windows import Windows, encode
from monkeyjump.mamba.texts import read_documents
from monkeyjump.tasks.models import load_tokenizer

WEIGHTS = (0.0, 1e-5, 10.0)
ROWS, LENGTH, SCORED = 2, 128, 8
FIX_AFTER = MaskConfig.fix_after
NAMES = ("sparsity", "moved", "as without", "loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="until the choice")
    asked = parser.parse_args()
    stream = encode(load_tokenizer(asked.model), read_documents(asked.text).texts)
    rows: dict[float, list[dict[str, float]]] = {weight: [] for weight in WEIGHTS}
    for seed in range(asked.seeds):
        windows = Windows(stream, LENGTH, ROWS * (asked.steps + SCORED), seed)
        batches = [_batch(windows, number) for number in range(asked.steps + SCORED)]
        learned, scored = batches[: asked.steps], batches[asked.steps :]
        without = None
        for weight in WEIGHTS:
            found = _learn(load_model(asked.model).float(), weight, seed, learned, scored)
            without = without or found
            row = {"sparsity": found["sparsity"], "loss": found["loss"]}
            row["moved"] = (found["logits"] - without["logits"]).abs().max().item()
            row["as without"] = ((found["kept"] & without["kept"]).sum() / found["kept"].sum()).item()
            rows[weight].append(row)
            print(f"seed {seed}, weight {weight:g}: {row}", flush=True)
    print(
        "| weight | expected sparsity at the choice | moved | as without | cross-entropy, cut |\n|---|---|---|---|---|"
    )
    for weight, own in rows.items():
        print(f"| {weight:g} | {' | '.join(_spread([row[name] for row in own]) for name in NAMES)} |")


def _batch(windows: Windows, number: int) -> dict[str, Tensor]:
    rows = [windows[number * ROWS + i] for i in range(ROWS)]
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def _learn(model: Any, weight: float, seed: int, batches: list[Any], scored: list[Any]) -> dict[str, Any]:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scores = channel_importance(model, batches[:4], channel_groups(model))
    masks = attach_masks(model, MaskConfig(sparsity_weight=weight, seed=seed), scores)
    logits = [gate.logits for gate in masks.gates.values()]
    optimizer = torch.optim.Adam(logits, lr=0.1)
    total = round(len(batches) / FIX_AFTER)  # of the run whose first part this is
    model.train()
    for step, batch in enumerate(batches):
        masks.advance(step, total)
        (model(**batch).loss + masks.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks.decide(masks.config.target_sparsity)
    sparsity = masks.expected_sparsity().item()
    masks.target = masks.config.target_sparsity
    model.eval()
    with torch.no_grad():
        loss = statistics.mean(model(**batch).loss.item() for batch in scored)
    kept = torch.cat([gate.kept for gate in masks.gates.values()])
    return {"sparsity": sparsity, "loss": loss, "logits": torch.cat(logits).detach(), "kept": kept}


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()

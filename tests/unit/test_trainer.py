"""The stock Trainer: resume at an odd step equals the uninterrupted run; accumulation equals the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from monkeyjump import CenterUpdate, initialize_centers
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

ADAPTERS = {
    "lora": {"lora_dropout": 0.05},
    "lora_fa": {"lora_dropout": 0.05},
    "adalora": {"lora_dropout": 0.05, "init_r": 4, "target_r": 2, "total_step": 6},
    "propulsion": {"init_weights": False},
}


def rows(count: int = 48) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(count, 7)]


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 11,
        **arguments,
    }
    update = CenterUpdate(every=2, until=5)
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows(), callbacks=[update])


def fresh(base: str) -> Any:
    model = routed(llama(), base=base, task_type="CAUSAL_LM", center_init="kmeans", **ADAPTERS[base])
    initialize_centers(model, rows(), max_tokens=100, progress=False)
    return model


def state_of(model: Any) -> dict[str, Tensor]:
    centers = {r.name: r.centers["default"].clone() for r in routers(model)}
    return {**{n: p.detach().clone() for n, p in trainable(model).items()}, **centers}


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("base", ADAPTERS)
def test_resuming_at_an_odd_step_equals_the_uninterrupted_run(base: str, tmp_path: Path) -> None:
    whole = trainer(fresh(base), tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(fresh(base), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    mine, theirs = state_of(resumed.model), state_of(whole.model)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    assert not any(r.gathered or r.pending or r.steps for r in routers(whole.model))


def test_centers_move_and_then_stand_still(tmp_path: Path) -> None:
    model = fresh("lora")
    start = state_of(model)
    run = trainer(model, tmp_path, max_steps=4)
    run.train()
    assert all(not torch.equal(start[r.name], r.centers["default"]) for r in routers(model))
    for router in routers(model):
        norms = router.centers["default"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("base", ["lora", "propulsion"])
def test_accumulation_over_four_equals_a_batch_four_times_as_large(base: str, tmp_path: Path) -> None:
    """Task loss, gradients (as the resulting weights under SGD) and centers (F36)."""
    results = []
    for size, accumulation in ((8, 1), (2, 4)):
        settings = {k: v for k, v in ADAPTERS[base].items() if k != "lora_dropout"}
        model = routed(llama(), base=base, task_type="CAUSAL_LM", **settings)
        run = trainer(
            model,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.5,
        )
        run.train()
        results.append((state_of(model), losses(run)))
    (joined, joined_losses), (split, split_losses) = results
    assert joined_losses == pytest.approx(split_losses, rel=1e-3)
    for name, value in joined.items():
        torch.testing.assert_close(split[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_task_ids_reach_the_routers_unless_trainer_removes_them(tmp_path: Path) -> None:
    data = [{**row, "task_ids": i % 2} for i, row in enumerate(rows(16))]
    model = routed(llama(), granularity="task", task_type="CAUSAL_LM")
    run = trainer(model, tmp_path, max_steps=2, remove_unused_columns=False)
    run.train_dataset = data
    run.train()
    refused = trainer(routed(llama(), granularity="task", task_type="CAUSAL_LM"), tmp_path, max_steps=2)
    refused.train_dataset = data
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        refused.train()

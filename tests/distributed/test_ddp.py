"""Two processes under DDP equal one process on the joined batch; a plain loop, `CenterUpdate().attach`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monkeyjump import CenterUpdate
from monkeyjump.tuner.model import routers
from tiny import gates, llama, routed, tokens, trainable

STEPS = 5
CONFIGS = {
    "lora": {"top_k": 1},
    "lora_fa": {"top_k": 2, "shared_modules": ["o_proj"]},
    "adalora": {"init_r": 4, "target_r": 2, "total_step": STEPS, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "propulsion": {"init_weights": False},
    "sequence": {"base": "lora", "granularity": "mean", "ema_assignment": "top1"},
}


def model_of(name: str, **changes: Any) -> nn.Module:
    config = {"base": name, "task_type": "CAUSAL_LM", **CONFIGS[name], **changes}
    return routed(llama(), **config).train()


def shares(step: int) -> list[Tensor]:
    """The rows `[B, T]` of each rank, 3 and 1 of them; rank 1's tokens are all the same, so one expert takes them."""
    return [tokens(3, 9, seed=step), torch.full((1, 9), 5 + step)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    centers = {f"centers of {r.name}": r.centers["default"].clone() for r in routers(model)}
    return {**centers, **{n.removeprefix("module."): p.detach().clone() for n, p in trainable(model).items()}}


def train(model: nn.Module, batches: list[Tensor], rows: list[int], ranks: int) -> dict[str, Any]:
    """`STEPS` steps; the loss of a step is a mean over the tokens of all ranks, which DDP averages over ranks."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.3)
    CenterUpdate(every=2, until=4).attach(model, optimizer, total_steps=STEPS)
    losses, grads = [], []
    for ids, total in zip(batches, rows):
        supervised = total * (ids.shape[1] - 1)
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(supervised)).loss
        (loss * ranks).backward()
        losses.append(loss.detach())
        grads.append({n.removeprefix("module."): p.grad.clone() for n, p in trainable(model).items()})
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": torch.stack(losses), "grads": grads, "state": state_of(model)}


def on_one_rank(rank: int, name: str, checkpointing: bool) -> dict[str, Any]:
    model = model_of(name)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped = DistributedDataParallel(model, static_graph=checkpointing)
    batches = [shares(step)[rank] for step in range(STEPS)]
    return train(wrapped, batches, [4] * STEPS, ranks=2)


def compare_runs(runs: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    first, second = runs
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), f"{key} differs between ranks"
    torch.testing.assert_close(first["losses"] + second["losses"], alone["losses"], atol=1e-5, rtol=1e-5)
    for mine, theirs in [*zip(first["grads"], alone["grads"]), (first["state"], alone["state"])]:
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, atol=2e-5, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")


def compare(name: str, folder: Path, checkpointing: bool = False) -> None:
    joined = [torch.cat(shares(step)) for step in range(STEPS)]
    alone = train(model_of(name), joined, [4] * STEPS, ranks=1)
    runs = run_ranks(on_one_rank, folder, name, checkpointing)
    compare_runs(runs, alone)
    start = state_of(model_of(name))
    assert all(not torch.equal(v, runs[0]["state"][k]) for k, v in start.items() if k.startswith("centers"))


@pytest.mark.proves("integration", "DDP, 2 processes")
def test_two_ranks_equal_the_joined_batch_with_a_starved_expert(tmp_path: Path) -> None:
    share = shares(0)[1]
    used = [(m > 0).flatten(0, 1).any(0).sum() for m in gates(model_of("lora").eval(), input_ids=share)]
    assert used == [1, 1]  # experts that rank 1's tokens take in each block, of 6
    compare("lora", tmp_path)


@pytest.mark.slow
@pytest.mark.proves("integration", "DDP, 2 processes")
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "lora"])
def test_two_ranks_equal_the_joined_batch(name: str, tmp_path: Path) -> None:
    compare(name, tmp_path)


@pytest.mark.slow
@pytest.mark.proves("integration", "DDP with gradient checkpointing, static graph")
def test_gradient_checkpointing_with_a_static_graph(tmp_path: Path) -> None:
    compare("lora", tmp_path, checkpointing=True)

"""Mixtures under DDP, one rank's tokens all alike: no expert leaves the graph, and the ranks stay equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moe_methods import METHODS, mixture
from tiny import tokens, trainable

# a mean over the tokens of all ranks is no mean of the ranks' losses where a loss is not linear in the tokens
LINEAR = {"balance_weight": 0.0}


def train(name: str, batches: list[Tensor], model: torch.nn.Module, ranks: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4 * 8)).loss
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n.removeprefix("module."): p.detach().clone() for n, p in trainable(model).items()}


def model_of(name: str) -> torch.nn.Module:
    silent = {"contrastive_weight": 0.0} if name == "moelora" else {}
    return mixture(name, **LINEAR, **silent).train()


def share(rank: int, step: int) -> Tensor:
    """3 rows and 1 row; rank 1's tokens are all the same, so the same experts take them."""
    return tokens(3, 9, seed=step) if rank == 0 else torch.full((1, 9), 5 + step)


def on_one_rank(rank: int, name: str, losses: bool) -> dict[str, Tensor]:
    model = mixture(name).train() if losses else model_of(name)
    return train(name, [share(rank, step) for step in range(3)], DistributedDataParallel(model), ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one_on_the_joined_batch(name: str, tmp_path: Path) -> None:
    joined = [torch.cat([share(0, step), share(1, step)]) for step in range(3)]
    alone = train(name, joined, model_of(name), ranks=1)
    first, second = run_ranks(on_one_rank, tmp_path, name, False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_ranks_stay_equal_with_auxiliary_losses(tmp_path: Path) -> None:
    first, second = run_ranks(on_one_rank, tmp_path, "moelora", True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)

"""Learned masks under DDP: two ranks see the same masks and equal one process on the joined batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monkeyjump.mamba.masks import LearnedMasks, MaskConfig, attach_masks
from tiny import tokens
from tiny_mamba import mamba

STEPS = 5


def train(rows: slice, ranks: int) -> dict[str, Tensor]:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5, ramp_end=0.5, fix_after=0.7))
    optimizer = torch.optim.SGD(masks.parameter_groups(model, 1.0), lr=0.1)
    wrapped: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    for step in range(STEPS):
        masks.advance(step, STEPS)
        ids = tokens(4, 8, seed=step)[rows]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        masks.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**{name: p.detach() for name, p in model.named_parameters()}, **kept_of(masks)}


def kept_of(masks: LearnedMasks) -> dict[str, Tensor]:
    return {f"kept {name}": units for name, units in masks.kept().items()}


def on_rank(rank: int) -> dict[str, Tensor]:
    return train(slice(2 * rank, 2 * rank + 2), 2)


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    first, second = run_ranks(on_rank, tmp_path)
    alone = train(slice(0, 4), 1)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)

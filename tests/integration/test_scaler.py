"""Float16 with a gradient scaler: a step that it skips leaves no statistics behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from monkeyjump import CenterUpdate
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

OVERFLOWS = (1, 2)  # steps whose gradients are made infinite


def centers(model: Any) -> list[Tensor]:
    return [router.centers["default"].clone() for router in routers(model)]


def run(skipped: bool, clear_first: bool = False) -> tuple[list[Tensor], int]:
    """Six steps, the overflowing ones scaled and skipped, or left out altogether: centers, completed steps."""
    model = routed(llama()).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    schedule = CenterUpdate(every=2, until=100).attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(6):
        if number in OVERFLOWS and not skipped:
            continue
        if clear_first:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(input_ids=tokens(seed=number), labels=tokens(seed=number)).loss
        scaler.scale(loss * (float("inf") if number in OVERFLOWS else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if not clear_first:
            optimizer.zero_grad()
    return centers(model), schedule.completed


@pytest.mark.proves("integration", "torch.amp.GradScaler, float16")
@pytest.mark.parametrize("clear_first", [False, True])
def test_skipped_step_discards_its_statistics(clear_first: bool) -> None:
    found, steps = run(skipped=True, clear_first=clear_first)
    expected, all_steps = run(skipped=False)
    assert steps == all_steps == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not any(torch.equal(a, b) for a, b in zip(found, centers(routed(llama()))))


def test_skipped_step_under_accelerate() -> None:
    model = routed(llama()).train()
    Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # accelerate itself makes one on accelerators only
    optimizer = AcceleratedOptimizer(torch.optim.SGD(trainable(model).values(), lr=0.0), scaler=scaler)
    schedule = CenterUpdate(every=1, until=100).attach(model, optimizer)
    before = centers(model)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        scaler.scale(loss * factor).backward()
        optimizer.step()
        assert optimizer.step_was_skipped != moves
        optimizer.zero_grad()
        assert all(torch.equal(a, b) != moves for a, b in zip(centers(model), before))
    assert schedule.completed == 1

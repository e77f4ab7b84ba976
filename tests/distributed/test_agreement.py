"""Ranks that do not agree, or stop, are told so; none waits for the others in vain."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from monkeyjump import CenterUpdate
from monkeyjump.routing import collectives
from monkeyjump.routing.collectives import all_ranks, host_ranks
from monkeyjump.tuner.model import routers
from tiny import llama, routed, tokens, trainable

pytestmark = pytest.mark.slow


def attach(rank: int, difference: str) -> str:
    """The error of a rank whose schedule, adapters or centers are not those of the other one."""
    odd = rank == 1
    targets = ["q_proj", "k_proj", "v_proj"] if odd and difference == "adapters" else ["q_proj", "v_proj"]
    model = routed(llama(), target_modules=targets, shared_modules=[]).train()
    if odd and difference == "centers":
        routers(model)[1].centers["default"][0, 0] += 1e-6
    update = CenterUpdate(every=3 if odd and difference == "every" else 2, until=0.5)
    steps = {"until": 20, "total_steps": None}.get(difference, 10) if odd else 10
    with pytest.raises((ValueError, RuntimeError)) as caught:
        update.attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1), total_steps=steps)
    return f"{caught.type.__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ("every", ["every is 2 on rank 0 and 3 on rank 1"] * 2),
        ("until", ["until is 5 on rank 0 and 10 on rank 1"] * 2),
        ("adapters", ["layers.0 (default) is [2, 32]", "layers.0 (default) is [2, 32]"]),
        ("centers", ["model.layers.1 (default) is [2, 32]"] * 2),
        ("total_steps", ["RuntimeError: rank 1 failed, so rank 0 stops, too: ValueError", "pass total_steps="]),
    ],
)
def test_a_schedule_of_its_own_is_refused_on_every_rank(difference: str, said: list[str], tmp_path: Path) -> None:
    for message, expected in zip(run_ranks(attach, tmp_path, difference, timeout=60), said):
        assert expected in message


def without_an_adapter(rank: int) -> list[torch.Tensor]:
    """Rank 1 loses an adapter, and runs the model one step less, in the middle of a run."""
    model = routed(llama()).train()
    model.add_adapter("second", model.peft_config["default"])
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    CenterUpdate(every=2, until=10).attach(model, optimizer)
    for step in range(4):
        if rank == 1 and step == 1:
            model.delete_adapter("second")
        if rank == 0 or step != 2:
            model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
    return [r.centers["default"] for r in routers(model)]


def test_an_adapter_that_goes_on_one_rank_holds_nobody_up(tmp_path: Path) -> None:
    first, second = run_ranks(without_an_adapter, tmp_path, timeout=60)
    assert all(map(torch.equal, first, second))


def fails(rank: int, where: str) -> str:
    def work() -> int:
        if rank == 1 and where == "raises":
            raise KeyError("a bad row")
        if rank == 1:
            os._exit(0)
        return rank

    def call() -> None:
        with host_ranks() as ranks:
            if rank == 1 and where == "is absent":
                all_ranks().exchange(0)  # waits elsewhere, as a rank does that never came to this call
            ranks.together(work)

    collectives.PATIENCE = collectives.timedelta(seconds=5)
    with pytest.raises((RuntimeError, KeyError)) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("raises", "rank 1 failed, so rank 0 stops, too: KeyError: 'a bad row'"),
        ("dies", "rank 0 got no answer from the other ranks: one of them has stopped"),
        ("is absent", "rank 0 got no answer from the other ranks: one of them has stopped, or does not take part"),
    ],
)
def test_a_failing_rank_stops_the_others_within_seconds(where: str, said: str, tmp_path: Path) -> None:
    assert said in run_ranks(fails, tmp_path, where, timeout=30)[0]

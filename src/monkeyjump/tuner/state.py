"""What a run in the middle of its training must keep beside weights and centers.

It travels in the adapter's own file, so that it is written with the centers that it belongs to,
whoever saves (Trainer, a plain loop), and found wherever the checkpoint is moved. A finished run
leaves none of it behind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from monkeyjump.routing.ema import CenterStatistics
from monkeyjump.tuner.router import Router

MARK = "training_state:"  # begins these keys in the file


def key_of(owner: str, field: str) -> str:
    """A key without dots, in which PEFT would look for the adapter's name."""
    return f"{MARK}{owner.replace('.', '/')}:{field.replace('.', '/')}"


def training_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Statistics gathered since the last update of the centers, and the number of completed steps."""
    state = {}
    for router in (m for m in model.modules() if isinstance(m, Router)):
        if not router.gathering.get(adapter):
            continue
        state[key_of(router.name, "steps")] = torch.tensor(router.steps.get(adapter, 0))
        if (gathered := router.gathered.get(adapter)) is not None:
            state[key_of(router.name, "sums")] = gathered.sums
            state[key_of(router.name, "counts")] = gathered.counts
    return state


@dataclass
class TrainingState:
    """The training state found in a file, by owner (a block's path) and field."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def restore(self, model: nn.Module, adapter: str) -> None:
        """Hand it to the model's routers, for `CenterUpdate` to go on with."""
        for router in (m for m in model.modules() if isinstance(m, Router)):
            saved = self.tensors.get(router.name.replace(".", "/"))
            if saved is None:
                continue
            router.steps[adapter] = int(saved["steps"])
            router.gathered.pop(adapter, None)
            if "sums" in saved:
                device = router.centers[adapter].device
                sums, counts = saved["sums"].to(device), saved["counts"].to(device)
                router.gathered[adapter] = CenterStatistics(sums, counts)


def split_training_state(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], TrainingState]:
    """Separate a file's weights from its training state."""
    weights, state = {}, TrainingState()
    for key, value in tensors.items():
        if MARK in key:
            owner, _, name = key.partition(MARK)[2].rpartition(":")
            state.tensors.setdefault(owner, {})[name] = value
        else:
            weights[key] = value
    return weights, state

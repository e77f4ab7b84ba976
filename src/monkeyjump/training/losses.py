"""The loss of each task, beside the loss that trains.

logits [B, T, V], labels [B, T], task_ids [B] -> per task: sum of the negative log-likelihoods, and their number
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


class TaskLosses:
    """Sums since the last `take`, kept where the losses are: nothing waits for the host."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, task_ids: Tensor) -> None:
        """One micro-batch; only supervised positions are looked at."""
        ahead = labels[:, 1:]
        supervised = ahead != IGNORED
        losses = F.cross_entropy(logits[:, :-1][supervised].float(), ahead[supervised], reduction="none")
        tasks = task_ids[:, None].expand_as(ahead)[supervised].to(losses.device)
        if self._sums is None:
            self._sums = torch.zeros(2, len(self.names), device=losses.device, dtype=torch.float64)
        self._sums[0].index_add_(0, tasks, losses.double())
        self._sums[1].index_add_(0, tasks, torch.ones_like(losses, dtype=torch.float64))

    def take(self) -> dict[str, float]:
        """`loss/TASK` -> mean over its supervised tokens, of all ranks; tasks that did not come are left out."""
        if self._sums is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums.cpu()
        self._sums = None
        return {
            f"loss/{name}": (total / count).item() for name, total, count in zip(self.names, sums, counts) if count > 0
        }

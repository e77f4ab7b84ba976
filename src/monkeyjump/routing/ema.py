"""How centers follow their tokens: sums gathered in the forward pass, moved between steps (Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from monkeyjump import native

EmaSpace = Literal["sphere", "raw", "mixed"]
EmaAssignment = Literal["topk", "top1"]


@dataclass
class CenterStatistics:
    """Sums and counts of the states assigned to each center.

    Plain tensors, never buffers: DDP overwrites every rank's buffers with rank 0's.

    Attributes:
        sums: `[C, d]` float32.
        counts: `[C]` float32.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, states: Tensor, assigned: Tensor, space: EmaSpace) -> CenterStatistics:
        """Statistics of one batch.

        Args:
            states: `[N, d]`, attended tokens (or sequence representations) only.
            assigned: bool `[N, C]`, the centers that each state counts for.
            space: `sphere` sums unit vectors, the others raw states.
        """
        states = states.float()
        if native.serves(states):
            return cls(*native.center_sums(states, assigned, unit=space == "sphere"))
        norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        finite = norms < torch.inf  # one state that is not would stay in a center for ever
        states, assigned = torch.where(finite, states, 0), assigned & finite
        weight = assigned.float()
        if space == "sphere":  # the sum of unit vectors, without a normalized copy of the states
            weight = torch.where(assigned, norms.clamp_min(1e-12).reciprocal(), 0)
        return cls(weight.T @ states, assigned.sum(0, dtype=torch.float32))

    @classmethod
    def none(cls, centers: int, dim: int, device: torch.device) -> CenterStatistics:
        """Of no state at all."""
        return cls(torch.zeros(centers, dim, device=device), torch.zeros(centers, device=device))

    def __add__(self, other: CenterStatistics | None) -> CenterStatistics:
        if other is None:
            return self
        return CenterStatistics(self.sums + other.sums, self.counts + other.counts)

    __radd__ = __add__


def summed(
    statistics: list[CenterStatistics], reduce: Callable[[list[Tensor]], list[Tensor]] = list
) -> list[CenterStatistics]:
    """Statistics of several centers, summed over the processes that `reduce` sums over (none, by default)."""
    tensors = reduce([tensor for one in statistics for tensor in (one.sums, one.counts)])
    return [CenterStatistics(sums, counts) for sums, counts in zip(tensors[::2], tensors[1::2])]


def moved_centers(centers: Tensor, statistics: CenterStatistics, momentum: float, space: EmaSpace) -> Tensor:
    """Centers after one EMA update: `c <- beta c + (1 - beta) mean(h)` (Eq. 6, App. D.3).

    Args:
        centers: `[C, d]` float32.
        statistics: what was gathered since the last update; a center without a state stays.
        momentum: beta.
        space: `sphere`: unit vectors averaged, center renormalized; `raw`: the paper's letter;
            `mixed`: raw means into a unit center, renormalized, as in the authors' released code.

    Returns:
        `[C, d]` float32.
    """
    counts = statistics.counts[:, None]
    mean = statistics.sums / counts.clamp_min(1)
    start = centers if space == "raw" else F.normalize(centers, dim=-1)
    moved = momentum * start + (1 - momentum) * mean
    if space != "raw":
        moved = F.normalize(moved, dim=-1)
    return torch.where(counts > 0, moved, centers)

"""How one task's tokens spread over the routed adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """`shares` sum to 1. `effective`: exp of the entropy of a block's shares, averaged over the blocks.

    Shares that look even over all blocks can hide that every block sends the task to a single adapter;
    `effective` shows it (1.0 then, `possible` where each block is used evenly).
    """

    shares: dict[str, float]
    effective: float
    possible: float


def spread(counts: Mapping[str, Tensor], slots: Mapping[str, tuple[str, ...]]) -> Spread:
    """From the counts per block [E] and the names of the slots they count."""
    names = list(dict.fromkeys(name for block in slots.values() for name in block))
    totals = dict.fromkeys(names, 0.0)
    effective = []
    for block, count in counts.items():
        share = count.double() / count.sum().clamp(min=1)
        effective.append(torch.special.entr(share).sum().exp())
        for name, value in zip(slots[block], share.tolist()):
            totals[name] += value / len(counts)
    possible = sum(map(len, slots.values())) / len(slots)
    return Spread(totals, torch.stack(effective).mean().item(), possible)

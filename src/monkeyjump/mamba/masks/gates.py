"""Gates: logits, a sample of them, and how they multiply a weight.

A gate is open (`M > 0.5`) with probability `sigmoid(L)`:

    M = sigmoid((L + noise) / tau),   noise = log u - log(1 - u),  u uniform

The noise is logistic, the difference of two Gumbels (binary concrete; Maddison et al., 2017, arXiv:1611.00712). The
hard-concrete gate stretches `M` to (-0.1, 1.1) and clips it (Louizos et al., 2018, arXiv:1712.01312). Gates multiply
weights through `torch.nn.utils.parametrize`, so that whoever reads `.weight` reads the masked one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LOW, HIGH = -0.1, 1.1  # the stretched interval of hard-concrete gates
SMALLEST = torch.finfo(torch.float32).eps


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard logistic noise of `shape`, float32."""
    uniform = torch.rand(shape, generator=generator).clamp(SMALLEST, 1 - SMALLEST)
    return uniform.log() - torch.log1p(-uniform)


def open_probability(logits: Tensor, relaxation: str, temperature: float) -> Tensor:
    """Probability that a gate is open: `M > 0.5` (logistic) or `M > 0` (hard-concrete)."""
    if relaxation == "hard_concrete":
        return torch.sigmoid(logits - temperature * math.log(-LOW / HIGH))
    return torch.sigmoid(logits)


def relaxed_gate(logits: Tensor, noise: Tensor, relaxation: str, temperature: Tensor | float) -> Tensor:
    """A sample in (0, 1), for hard-concrete in [0, 1]."""
    gate = torch.sigmoid((logits + noise) / temperature)
    return (gate * (HIGH - LOW) + LOW).clamp(0, 1) if relaxation == "hard_concrete" else gate


class Gate(nn.Module):
    """Logits of `shape`, and the gates they give: a sample in training, the kept ones as 0 or 1 in evaluation.

    Noise, temperature and what is kept are set from outside, once per step (`LearnedMasks.advance`): weight and bias,
    a forward and its recomputation, and all ranks then see the same gates. `learned` holds the logits as they were when
    the choice was made, zeros before: checkpoints keep it, and an order of the channels moves it along.
    """

    def __init__(self, shape: tuple[int, ...], relaxation: str, straight_through: bool, device: torch.device) -> None:
        super().__init__()
        self.relaxation, self.straight_through = relaxation, straight_through
        self.logits = nn.Parameter(torch.zeros(shape, device=device))
        self.learned = nn.Parameter(torch.zeros(shape, device=device), requires_grad=False)
        self.noise: Tensor
        self.kept: Tensor
        self.temperature: Tensor
        self.register_buffer("noise", torch.zeros(shape, device=device), persistent=False)
        self.register_buffer("kept", torch.ones(shape, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("temperature", torch.ones((), device=device), persistent=False)

    def forward(self) -> Tensor:
        """Gates in the shape of the logits, float32."""
        if not self.training:
            return self.kept.float()
        gate = relaxed_gate(self.logits.float(), self.noise.float(), self.relaxation, self.temperature)
        if self.straight_through:
            return (gate - gate.detach()) + (gate > 0.5).float()  # in this order: 0 + exactly 0 or 1
        return gate


class GatedRows(nn.Module):
    """Parametrization: every row of a weight times the gate of its unit; rows of no unit stay.

    The gate belongs to the block (weight and bias share it) and is not registered here a second time.
    """

    def __init__(self, gate: Gate, unit_of_row: Tensor) -> None:
        super().__init__()
        self._gate = (gate,)
        self.unit_of_row: Tensor
        self.register_buffer("unit_of_row", unit_of_row.to(gate.logits.device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        gates = self._gate[0]()
        rows = torch.cat([gates, gates.new_ones(1)])[self.unit_of_row].to(weight.dtype)
        return weight * rows.view(-1, *[1] * (weight.ndim - 1))

    def channel_axes(self, axis: int) -> list[tuple[nn.Parameter, int]]:
        """None of its own: the gate's logits are a place of the block."""
        return []


class GatedElements(nn.Module):
    """Parametrization: every element of a weight times its own gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gate().to(weight.dtype)

    def channel_axes(self, axis: int) -> list[tuple[nn.Parameter, int]]:
        """The logits lie as the weight does."""
        return [(self.gate.logits, axis), (self.gate.learned, axis)]

"""Second moments and correlations of the inner channels over data, one batch at a time.

The channels are taken where the block reads them back: the input of out_proj (down_proj), `[B, T, D]`. It is the
place that decides what removing a channel costs, and the same one in Mamba, Mamba-2 and an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from monkeyjump.mamba.channel_group import ChannelGroup
from monkeyjump.mamba.evaluating import Batch, attended, evaluating

CONSTANT = 1e-12  # a variance below this share of the mean square is rounding


class Moments:
    """Count, sum `[D]` and second moment `[D, D]` of rows, in float64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.second = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add `[tokens, D]`."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(0)
        self.second += rows.T @ rows

    def covariance(self) -> Tensor:
        """`[D, D]`, by the count (not the count less one)."""
        mean = self.total / self.count
        return self.second / self.count - torch.outer(mean, mean)

    def absolute_correlation(self) -> Tensor:
        """`|rho|` `[D, D]`; a constant channel correlates with none but itself."""
        covariance = self.covariance()
        variance = covariance.diagonal()
        constant = variance <= CONSTANT * self.second.diagonal() / self.count
        scale = torch.where(constant, 0, variance.clamp_min(torch.finfo(variance.dtype).tiny).rsqrt())
        return (covariance * torch.outer(scale, scale)).abs().clamp_max(1).fill_diagonal_(1)


def collect_moments(
    model: nn.Module, batches: Iterable[Batch], groups: Mapping[str, ChannelGroup]
) -> dict[str, Moments]:
    """Moments of every group's channels over `batches` (keyword arguments of the model), padding left out.

    Raises `ValueError` if there is no batch.
    """
    moments: dict[str, Moments] = {}
    current: Batch = {}

    def add(name: str, values: Tensor) -> None:
        if name not in moments:
            moments[name] = Moments(values.shape[-1], values.device)
        moments[name].update(attended(values, current))

    hooks = [
        group.block.get_submodule(group.reader).register_forward_pre_hook(
            lambda module, inputs, name=name: add(name, inputs[0])
        )
        for name, group in groups.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            for current in batches:
                model(**current)
    finally:
        for hook in hooks:
            hook.remove()
    if not moments:
        raise ValueError("batches is empty: statistics of the channels need at least one batch")
    return moments


def unit_correlation(correlation: Tensor, width: int) -> Tensor:
    """`|rho|` of channels `[D, D]` -> of units `[D / width, D / width]`: the mean over their pairs of channels."""
    units = len(correlation) // width
    return correlation.view(units, width, units, width).mean(dim=(1, 3)).fill_diagonal_(1)

"""Floating-point operations of a forward pass: what the shapes cost, masks never credited.

Matrix products are counted by torch's flop counter (attention as two products over all pairs of positions); a shrunk
model's are smaller. Of experts, those count that the tokens are sent to. What the counter does not see is counted by
formula, per token, for D channels, N states, K taps:

    convolution  2 K D
    scan         Mamba    7 N D: delta A, exp, (delta u) B, a h, +, C h, +
                 Mamba-2  5 N D: (dt x) B, a h, +, C h, + (the recurrence, however it is evaluated)
    elementwise  5 D: delta u, D u, +, silu(z) y as two
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from monkeyjump.mamba.evaluating import evaluating
from monkeyjump.mamba.patch import STOCK, patched_mamba
from monkeyjump.mamba.patch_mixers import SCANNING

PER_STATE = {False: 7, True: 5}  # Mamba, Mamba-2
PER_CHANNEL = 5


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass by kind."""

    matmul: int
    convolution: int
    scan: int
    elementwise: int

    @property
    def total(self) -> int:
        return self.matmul + self.convolution + self.scan + self.elementwise


def forward_flops(model: nn.Module, batch: int, length: int) -> Flops:
    """Count a forward pass of `[batch, length]` token ids, without a cache; it is run once."""
    ids = torch.zeros(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), _countable(model) as mixers, sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=ids, use_cache=False)
    tokens = batch * length
    sizes = [_sizes(mixer) for mixer in mixers]
    return Flops(
        matmul=counter.get_total_flops(),
        convolution=tokens * sum(2 * taps * convolved for _, _, convolved, taps in sizes),
        scan=tokens * sum(scanned for _, scanned, _, _ in sizes),
        elementwise=tokens * sum(PER_CHANNEL * channels for channels, _, _, _ in sizes),
    )


@contextmanager
def _countable(model: Any) -> Iterator[list[nn.Module]]:
    """Mixers whose scan is one operation, which the counter does not enter, and experts as plain products.

    Gives the mixers.
    """
    mixers = [module for module in model.modules() if type(module) in {*SCANNING, *STOCK}]
    experts = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        with patched_mamba(model) if mixers else nullcontext():
            yield mixers
    finally:
        model.set_experts_implementation(experts)


def _sizes(mixer: Any) -> tuple[int, int, int, int]:
    """Channels, operations of the scan per token, channels of the convolution, its taps."""
    convolved, _, taps = mixer.conv1d.weight.shape
    second = mixer.A_log.dim() == 1  # one number per head
    channels = len(mixer.A_log) * mixer.head_dim if second else mixer.A_log[..., 0].numel()
    states = mixer.ssm_state_size if second else mixer.A_log.shape[-1]
    return channels, PER_STATE[second] * states * channels, convolved, taps

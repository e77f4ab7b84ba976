"""Floating-point operations of a forward pass: what the shapes cost, masks never credited.

Matrix products are counted by torch's flop counter (attention as two products over all pairs of positions); a shrunk
model's are smaller. What the counter does not see is counted by formula, per token, for D channels, N states, K taps:

    convolution  2 K D
    scan         Mamba    7 N D: delta A, exp, (delta u) B, a h, +, C h, +
                 Mamba-2  5 N D: (dt x) B, a h, +, C h, + (the recurrence, however it is evaluated)
    elementwise  5 D: delta u, D u, +, silu(z) y as two
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from monkeyjump.mamba.channels import MIXERS
from monkeyjump.mamba.evaluating import evaluating
from monkeyjump.mamba.patch import patched_mamba

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
    """Count a forward pass of `[batch, length]` token ids, without a cache; it is run once.

    Raises `ValueError` for Jamba, whose mixers multiply by a weight outside of its module.
    """
    mixers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if any(isinstance(module, cls) for cls in MIXERS)
    }
    if any(isinstance(mixer, JambaMambaMixer) for mixer in mixers.values()):
        raise ValueError("JambaMambaMixer cannot be counted: its dt_proj is not called as a module")
    ids = torch.zeros(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    mixing = patched_mamba(model) if mixers else nullcontext()
    with evaluating(model), torch.no_grad(), mixing, sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=ids, use_cache=False)
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    root = type(model).__name__
    inside = sum(_own(counts, f"{root}.{name}", mixer) for name, mixer in mixers.items())  # the scans' products
    tokens = batch * length
    sizes = [_sizes(mixer) for mixer in mixers.values()]
    return Flops(
        matmul=counts["Global"] - inside,
        convolution=tokens * sum(2 * taps * convolved for _, _, convolved, taps in sizes),
        scan=tokens * sum(scanned for _, scanned, _, _ in sizes),
        elementwise=tokens * sum(PER_CHANNEL * channels for channels, _, _, _ in sizes),
    )


def _own(counts: dict[str, int], name: str, module: nn.Module) -> int:
    """What a module does itself, not in its children."""
    return counts.get(name, 0) - sum(counts.get(f"{name}.{child}", 0) for child, _ in module.named_children())


def _sizes(mixer: Any) -> tuple[int, int, int, int]:
    """Channels, operations of the scan per token, channels of the convolution, its taps."""
    convolved, _, taps = mixer.conv1d.weight.shape
    second = isinstance(mixer, Mamba2Mixer)
    channels = len(mixer.norm.weight) if second else len(mixer.A_log)
    states = mixer.ssm_state_size if second else mixer.A_log.shape[1]
    return channels, PER_STATE[second] * states * channels, convolved, taps

"""The causal depthwise convolution in front of the scan, over `[B, L, D]` as the projections leave it.

    y[t] = bias + sum_k weight[:, k] x[t - (K - 1) + k]

For its four taps, a few multiply-adds over the whole sequence are faster than torch's grouped convolution, whose
backward pass alone costs more than the whole scan (docs/mamba/scan.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[B, L, D]` in the dtype of `x`.

    Args:
        x: `[B, L, D]`.
        weight: `[D, 1, K]`, that of an `nn.Conv1d` with D groups.
        bias: `[D]` or None.
    """
    length, taps = x.shape[1], weight.shape[2]
    wide = F.pad(x, (0, 0, taps - 1, 0)).to(weight.dtype)
    y = wide[:, :length] * weight[:, 0, 0] if bias is None else torch.addcmul(bias, wide[:, :length], weight[:, 0, 0])
    for k in range(1, taps):
        y = torch.addcmul(y, wide[:, k : k + length], weight[:, 0, k])
    return y.to(x.dtype)

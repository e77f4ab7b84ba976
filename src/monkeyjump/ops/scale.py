"""Gated scaling of a layer's outputs (Propulsion) as one operation.

    out = y * (1 + m * gain)          y [N, d_out]   gain [d_out]   m [N, 1]   out [N, d_out]

Autograd on the same formula keeps `m * gain` and its sum with 1, as wide as the output each, and y in
two dtypes. Here y is kept, and nothing else that is wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from monkeyjump import native


def gated_scale_reference(y: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    """The formula, for autograd to differentiate: what `gated_scale` is tested against.

    Args:
        y: `[..., d_out]`.
        gain: `[d_out]` float32.
        gate: broadcastable to `[..., 1]`, float32, or None for 1.
    """
    return y * (1 + (gain if gate is None else gate * gain)).to(y.dtype)


def gated_scale(y: Tensor, gain: Tensor, gate: Tensor | None = None) -> Tensor:
    """`y * (1 + gate * gain)`, `[..., d_out]` in the dtype of `y`.

    Args:
        y: `[..., d_out]`.
        gain: `[d_out]` float32 (float64 for a float64 y).
        gate: broadcastable to `[..., 1]`, without gradient, in the dtype of `gain`; None for 1.

    Raises:
        RuntimeError: when differentiated twice.
    """
    flat = y.reshape(-1, y.shape[-1])
    if gate is None:
        gate = gain.new_ones(1)
    per_token = gate.expand(*y.shape[:-1], 1).reshape(-1, 1).contiguous()
    return _GatedScale.apply(flat, gain, per_token).view(y.shape)


class _GatedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y, gain, gate):
        ctx.save_for_backward(y, gain, gate)
        if native.serves(y, gain):
            return native.scale_forward(y, gain, gate)
        return gated_scale_reference(y, gain, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        y, gain, gate = ctx.saved_tensors
        if native.serves(grad, y, gain):
            return *native.scale_backward(grad, y, gain, gate), None
        grad_y = gated_scale_reference(grad, gain, gate) if ctx.needs_input_grad[0] else None
        grad_gain = (gate.T @ (grad.to(gain.dtype) * y.to(gain.dtype))).squeeze(0)
        return grad_y, grad_gain, None

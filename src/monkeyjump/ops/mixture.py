"""A mixture of low-rank experts, and of scalings, as one forward and one backward each.

    y = x W^T + b  +  v B^T      v = (x A^T).view(N, E or 1, r) * (g * scale).unsqueeze(-1), viewed as [N, E r]

    x [N, d_in]   A [E r, d_in], or [r, d_in] shared by all experts   B [d_out, E r]   g [N, E]   y [N, d_out]

Every expert is computed for every token and weighed with 0 where the token did not choose it: at these
ranks that costs less than gathering and scattering, no expert leaves the graph, and nothing of shape
[N, E, d_out] comes about. Kept for the backward pass: x (shared with whatever else reads it), x A^T,
the gates, and a dropout mask as bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from monkeyjump.ops.dropout import DropoutMask, spread
from monkeyjump.ops.low_rank import thin_products


def mixture_delta_reference(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: float, keep: Tensor | None
) -> Tensor:
    """The formula, for autograd to differentiate: what `mixture_linear` is tested against.

    Args:
        x: `[..., d_in]`.
        gates: `[..., E]`.
        keep: `[..., d_in]`, the dropout mask already divided by 1 - p, or None.
    """
    u = F.linear(x if keep is None else x * keep, a.to(x.dtype))
    return F.linear(_weighed(u, gates.to(x.dtype) * scale, b.shape[1]), b.to(x.dtype))


def mixture_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor,
    scale: float = 1.0,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """A frozen linear layer with its mixture of low-rank experts, `[..., d_out]` in the dtype of `x`.

    Args:
        x: `[..., d_in]`.
        weight, bias: `[d_out, d_in]`, `[d_out]` or None, frozen, in the dtype of `x`.
        a: `[E r, d_in]`, expert after expert, or `[r, d_in]`, one for all experts; any float dtype.
        b: `[d_out, E r]`.
        gates: `[..., E]`, with or without gradient.
        scale: alpha / r.
        dropout: mask of the dropout on the experts' input.

    Raises:
        RuntimeError: when differentiated twice.
    """
    y = _Mixture.apply(_flat(x), weight, bias, a, b, _flat(gates), scale, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


def mixture_delta(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, scale: float = 1.0, dropout: DropoutMask | None = None
) -> Tensor:
    """The experts' sum alone, `[..., d_out]`, for a base layer that is no plain Linear (quantized, say).

    Args:
        x, a, b, gates, scale, dropout: as in `mixture_linear`.
    """
    y = _Mixture.apply(_flat(x), None, None, a, b, _flat(gates), scale, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


def mixture_scale_reference(y: Tensor, gain: Tensor, gates: Tensor) -> Tensor:
    """`y * (1 + sum_n g_n gain_n)`, for autograd to differentiate.

    Args:
        y: `[..., d_out]`.
        gain: `[E, d_out]` float32.
        gates: `[..., E]` float32.
    """
    return y * (1 + gates @ gain).to(y.dtype)


def mixture_scale(y: Tensor, gain: Tensor, gates: Tensor) -> Tensor:
    """As `mixture_scale_reference`; of what is `d_out` wide, only `y` is kept.

    Raises:
        RuntimeError: when differentiated twice.
    """
    return _MixtureScale.apply(_flat(y), gain, _flat(gates)).view(y.shape)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in float32, also under autocast, `[..., E]`; `x` is kept in its own dtype.

    Args:
        x: `[..., d_in]`.
        weight: `[E, d_in]` float32 (float64 for a float64 x).

    Raises:
        RuntimeError: when differentiated twice.
    """
    return _RouterLogits.apply(_flat(x), weight).view(*x.shape[:-1], weight.shape[0])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weighed(u: Tensor, gates: Tensor, width: int) -> Tensor:
    """`u` `[..., E r]` or `[..., r]` times its expert's gate `[..., E]`, as `[..., E r]`."""
    experts = gates.shape[-1]
    return (u.unflatten(-1, (-1, width // experts)) * gates.unsqueeze(-1)).flatten(-2)


def _exact(x: Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, gates, scale, dropout):
        bits = None if dropout is None else dropout.bits
        ctx.scale = scale = scale if dropout is None else scale * dropout.factor
        a, b = a.to(x.dtype), b.to(x.dtype)  # kept like this; autograd takes their gradients back to their own dtype
        with _exact(x):
            dropped = x if bits is None else x * spread(bits, x.shape, x.dtype)
            u = dropped @ a.T
            v = _weighed(u, (gates * scale).to(u.dtype), b.shape[1])
            y = v @ b.T if bias is None else torch.addmm(bias, v, b.T)
            if weight is not None:
                y.addmm_(x, weight.T)
        ctx.shape = x.shape
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, a, b, u, gates, bits)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight, a, b, u, gates, bits = ctx.saved_tensors
        wants_x, _, _, wants_a, _, wants_gates = ctx.needs_input_grad[:6]
        experts, dtype = gates.shape[1], u.dtype
        with _exact(grad):
            scaled = (gates * ctx.scale).to(dtype)
            grad_b, grad_v = thin_products(grad, _weighed(u, scaled, b.shape[1]), b)
            grad_v = grad_v.unflatten(-1, (experts, -1))
            grad_gates = None
            if wants_gates:
                grad_gates = (grad_v * u.unflatten(-1, (-1, grad_v.shape[-1]))).sum(-1).to(gates.dtype) * ctx.scale
            grad_u = grad_v * scaled.unsqueeze(-1)
            grad_u = grad_u.sum(1) if u.shape[1] == grad_v.shape[-1] else grad_u.flatten(1)
            mask = None if bits is None else spread(bits, ctx.shape, dtype)
            grad_x = grad_a = None
            if wants_a:
                grad_a = grad_u.T @ (x if mask is None else x * mask)
            if wants_x:
                grad_x = grad_u @ a
                if mask is not None:
                    grad_x.mul_(mask)
                if weight is not None:
                    grad_x.addmm_(grad, weight)
        return grad_x, None, None, grad_a, grad_b, grad_gates, None, None


class _MixtureScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y, gain, gates):
        ctx.save_for_backward(y, gain, gates)
        with _exact(y):
            return mixture_scale_reference(y, gain, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        y, gain, gates = ctx.saved_tensors
        with _exact(y):
            grad_y = mixture_scale_reference(grad, gain, gates) if ctx.needs_input_grad[0] else None
            grad_factor = grad.to(gain.dtype) * y.to(gain.dtype)
            return grad_y, gates.T @ grad_factor, grad_factor @ gain.T


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight):
        ctx.save_for_backward(x, weight)
        with _exact(x):
            return x.to(weight.dtype) @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        x, weight = ctx.saved_tensors
        with _exact(grad):
            grad_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
            return grad_x, grad.T @ x.to(weight.dtype)

"""The gated low-rank update as one forward and one backward.

    y = x W^T + b  +  (x A^T * g) B^T          g = gate * scale, one number per token

    x [N, d_in]   W [d_out, d_in]   A [r, d_in]   B [d_out, r]   g [N, 1]   y [N, d_out]

Autograd on the same formula keeps the dropped input and its mask, casts x to the adapter's dtype once
for every adapter that reads it, and passes over [N, d_out] and [N, d_in] once for the sum of base and
update each. Here the update is written first and the base product accumulated onto it, which costs a
BLAS nothing; the gradient of x comes about in the same way. x itself is kept (siblings that read the
same x keep the same storage), a dropout mask is kept as bits, and where A is frozen (LoRA-FA) only the
rank-r product is kept. In float32 on a CPU the thin products are kernels of `monkeyjump.native`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from monkeyjump import native
from monkeyjump.ops.dropout import DropoutMask, spread


def gated_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, keep: Tensor | None
) -> Tensor:
    """The formula, for autograd to differentiate: what `gated_linear` is tested against.

    Args:
        x: `[..., d_in]`.
        gate: `[..., 1]`, gate times scale, or None for 1.
        keep: `[..., d_in]`, the dropout mask already divided by 1 - p, or None.
    """
    u = F.linear(x if keep is None else x * keep, a)
    return F.linear(x, weight, bias) + F.linear(u if gate is None else u * gate, b)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None = None,
    scale: float = 1.0,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """A frozen linear layer with its gated low-rank update, `[..., d_out]` in the dtype of `x`.

    Args:
        x: `[..., d_in]`.
        weight, bias: `[d_out, d_in]`, `[d_out]` or None, frozen, in the dtype of `x`.
        a, b: `[r, d_in]`, `[d_out, r]`, any float dtype; the products are taken in the dtype of `x`.
        gate: float32, broadcastable to `[..., 1]`, without gradient; None for 1.
        scale: alpha / r.
        dropout: mask of the dropout on the update's input.

    Raises:
        RuntimeError: when differentiated twice, save on a GPU without dropout, where it can be.
    """
    scale = scale if dropout is None else scale * dropout.factor
    flat, gate = _flat(x), _per_token(gate, x)
    if not torch.is_grad_enabled():
        y = _linear(flat, weight, bias, a.to(x.dtype), b.to(x.dtype), gate, scale, dropout)[0]
    elif dropout is None and x.is_cuda:
        y = _composed(flat, weight, bias, a.to(x.dtype), b.to(x.dtype), gate, scale)
    else:
        y = _GatedLinear.apply(flat, weight, bias, a, b, gate, scale, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gate: Tensor | None, scale: float
) -> Tensor:
    """The same for autograd to differentiate, which calls the kernels of the backward pass without Python.

    Where launching kernels takes longer than running them, that counts. It keeps what `_GatedLinear` keeps.
    """
    u = _weigh(F.linear(x, a), None if gate is None else gate.to(x.dtype), scale)
    return F.linear(x, weight, bias).addmm_(u, b.T)


def gated_delta(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor | None = None,
    scale: float = 1.0,
    dropout: DropoutMask | None = None,
) -> Tensor:
    """The update alone, `[..., d_out]`, for a base layer that is no plain Linear (quantized, say).

    Args:
        x, a, b, gate, scale, dropout: as in `gated_linear`.
    """
    scale = scale if dropout is None else scale * dropout.factor
    delta = _GatedDelta.apply(_flat(x), a, b, _per_token(gate, x), scale, dropout)
    return delta.view(*x.shape[:-1], delta.shape[-1])


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _per_token(gate: Tensor | None, x: Tensor) -> Tensor | None:
    """`[N, 1]` for the flattened x; a view where there is one gate per token."""
    if gate is None or gate.dim() == 2:
        return gate
    if gate.shape[:-1] != x.shape[:-1]:
        gate = gate.expand(*x.shape[:-1], 1)
    return gate.reshape(-1, 1)


def _weigh(u: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """`u * gate * scale`, in place; the gate may be of a higher precision."""
    return u.mul_(scale if gate is None else gate if scale == 1 else gate * scale)


def thin_products(grad: Tensor, u: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`grad^T u` `[d_out, r]` and `grad B` `[N, r]` for `grad` `[N, d_out]` and `u` `[N, r]`."""
    if grad.is_cuda:  # where every call counts; gradients come laid out like their parameters
        return grad.T @ u, grad @ b
    return (u.T @ grad).T, grad @ b.T.contiguous().T  # the layouts in which a CPU's BLAS takes a fraction of the time


def _update(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, gate: Tensor | None, scale: float, bits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`y = u B^T + bias` `[N, d_out]` and `u = (dropout(x) A^T) * gate * scale` `[N, r]`."""
    if native.serves_update(a, b, x, bias):
        return native.low_rank_forward(x, a, b, bias, gate, scale, bits)
    if bits is not None:
        x = x * spread(bits, x.shape, x.dtype)
    u = _weigh(x @ a.T, gate, scale)
    return u @ b.T if bias is None else torch.addmm(bias, u, b.T), u


class _Update(torch.autograd.Function):
    """What both operations share: what is kept, and the update's gradients."""

    @staticmethod
    def keep(ctx: Any, x, a, b, u, gate, scale: float, dropout: DropoutMask | None, trained: bool) -> tuple:
        """Tensors for `save_for_backward`; x only where the gradient of A, if that is `trained`, will read it.

        Args:
            a, b: in the dtype of x.
        """
        ctx.shape, ctx.scale = x.shape, scale
        return x if trained else None, a, b, u, gate, None if dropout is None else dropout.bits

    @staticmethod
    def grads(ctx: Any, grad: Tensor, kept: tuple) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradients of x, A and B: the first two where they are wanted."""
        x, a, b, u, gate, bits = kept
        wants_x = ctx.needs_input_grad[0]
        if native.serves_update(a, b, grad, x):
            return native.low_rank_backward(grad, x, a, b, u, gate, ctx.scale, bits, wants_x)
        grad_b, grad_u = thin_products(grad, u, b)
        grad_u = _weigh(grad_u, gate, ctx.scale)
        mask = None if bits is None else spread(bits, ctx.shape, grad.dtype)
        grad_a = grad_x = None
        if x is not None:
            grad_a = grad_u.T @ (x if mask is None else x * mask)
        if wants_x:
            grad_x = grad_u @ a
            if mask is not None:
                grad_x.mul_(mask)
        return grad_x, grad_a, grad_b


def _linear(x, weight, bias, a, b, gate, scale, dropout) -> tuple[Tensor, Tensor]:
    """The layer's output and u; A and B are in the dtype of x."""
    y, u = _update(x, a, b, bias, gate, scale, None if dropout is None else dropout.bits)
    return y.addmm_(x, weight.T), u


class _GatedLinear(_Update):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, gate, scale, dropout):
        a, b = a.to(x.dtype), b.to(x.dtype)  # kept like this; autograd takes their gradients back to their own dtype
        y, u = _linear(x, weight, bias, a, b, gate, scale, dropout)
        ctx.save_for_backward(weight, *_Update.keep(ctx, x, a, b, u, gate, scale, dropout, ctx.needs_input_grad[3]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        weight, *kept = ctx.saved_tensors
        grad_x, grad_a, grad_b = _Update.grads(ctx, grad, tuple(kept))
        if grad_x is not None:
            grad_x.addmm_(grad, weight)
        return grad_x, None, None, grad_a, grad_b, None, None, None


class _GatedDelta(_Update):
    @staticmethod
    def forward(ctx: Any, x, a, b, gate, scale, dropout):
        a, b = a.to(x.dtype), b.to(x.dtype)
        y, u = _update(x, a, b, None, gate, scale, None if dropout is None else dropout.bits)
        ctx.save_for_backward(*_Update.keep(ctx, x, a, b, u, gate, scale, dropout, ctx.needs_input_grad[1]))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        return *_Update.grads(ctx, grad, ctx.saved_tensors), None, None, None

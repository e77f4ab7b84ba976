"""The two passes as operators of torch, so that autograd and `torch.compile` see one step each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monkeyjump.mamba.ssd.backward import backward
from monkeyjump.mamba.ssd.blocks import CHUNK
from monkeyjump.mamba.ssd.forward import forward


@torch.library.custom_op("monkeyjump::ssd_scan", mutates_args=())
def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ssd_scan`: y, the last state, and the states that `scan_backward` needs."""
    y, last, starts = forward(*_prepared(x, dt, A, B, C, D), _grouped(state, x, B))
    return y, last.view(state.shape), starts


@torch.library.custom_op("monkeyjump::ssd_scan_backward", mutates_args=())
def scan_backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor,
    grad: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, A, B, C, D (nothing of use where D is None) and the first state."""
    found = backward(*_prepared(x, dt, A, B, C, D), starts, grad, _grouped(grad_last, x, B))
    grad_x, grad_dt, grad_a, grad_b, grad_c, grad_d, grad_state = found
    of_heads = grad_a.flatten().to(A.dtype), grad_d.flatten().to(A.dtype if D is None else D.dtype)
    return grad_x, grad_dt.to(dt.dtype), of_heads[0], grad_b, grad_c, of_heads[1], grad_state.view(grad_last.shape)


def exact_dtype(x: Tensor) -> torch.dtype:
    """In which the scan computes and keeps its states."""
    return torch.promote_types(x.dtype, torch.float32)


def _prepared(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What belongs to heads in the precision of the computation, A as `[G, R, 1]`, D as `[G, 1, R, 1]`."""
    groups, exact = B.shape[2], exact_dtype(x)
    skip = None if D is None else D.to(exact).view(groups, 1, -1, 1)
    return x, dt.to(exact), A.to(exact).view(groups, -1, 1), B, C, skip


def _grouped(state: Tensor, x: Tensor, B: Tensor) -> Tensor:
    """A state `[B, H, P, N]` as `[B, G, R * P, N]`."""
    (batch, _, heads, width), (groups, states) = x.shape, B.shape[2:]
    return state.to(exact_dtype(x)).reshape(batch, groups, heads // groups * width, states)


@scan.register_fake
def _scan_shapes(x, dt, A, B, C, D, state):
    like = state.new_empty((), dtype=exact_dtype(x))
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    starts = -(-length // CHUNK), batch, groups, heads // groups * width, states
    return x.new_empty(x.shape), like.new_empty(state.shape), like.new_empty(starts)


@scan_backward.register_fake
def _backward_shapes(x, dt, A, B, C, D, starts, grad, grad_last):
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, A if D is None else D, grad_last))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.shape = inputs[6].shape


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None and grad_last is None:
        return (None,) * 7
    kept = ctx.saved_tensors  # once: checkpointing refuses a second look
    x, *_, D, starts = kept
    grad = torch.zeros_like(x) if grad is None else grad
    grad_last = starts.new_zeros(ctx.shape) if grad_last is None else grad_last
    *others, grad_d, grad_state = scan_backward(*kept, grad, grad_last)
    return *others, None if D is None else grad_d, grad_state


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("ssd_scan cannot be differentiated twice")


scan.register_autograd(_differentiate, setup_context=_keep)
scan_backward.register_autograd(_refuse)

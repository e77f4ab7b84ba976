"""The recurrence as one operation of torch, for the backends that bring their own backward pass.

As an operation (`torch.library`) it is one node for torch.compile, has shapes on the meta device, and keeps for the
backward pass only its inputs and every so manieth state.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from monkeyjump.mamba.scan import chunked
from monkeyjump.native import scan as native

_MODULES: dict[str, ModuleType] = {"native": native, "chunked": chunked}


def scan(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`y` `[B, D, L]` and the last state `[B, D, N]`.

    Args:
        backend: "native" or "chunked".
        u, delta, A, B, C, D, first: as in `reference.scan`, all of one dtype.

    Raises:
        RuntimeError: when differentiated twice.
    """
    inputs = (u, delta, A, B, C, D, first)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last, _ = _forward(backend, *inputs, keep)
    return y, last


@torch.library.custom_op("monkeyjump::selective_scan", mutates_args=())
def _forward(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    first: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _MODULES[backend].forward(u, delta, A, B, C, D, first, keep)


@_forward.register_fake
def _forward_shapes(backend, u, delta, A, B, C, D, first, keep):
    states = A.shape[1]
    kept = u.new_empty(_MODULES[backend].kept_shape(u, states) if keep else 0)
    return torch.empty_like(u), u.new_empty(*u.shape[:2], states), kept


@torch.library.custom_op("monkeyjump::selective_scan_backward", mutates_args=())
def _backward(
    backend: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    kept: Tensor,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _MODULES[backend].backward(u, delta, A, B, C, D, kept, grad, grad_last)


@_backward.register_fake
def _backward_shapes(backend, u, delta, A, B, C, D, kept, grad, grad_last):
    (batch, channels, length), states = u.shape, A.shape[1]
    by_step = (u.new_empty(batch, length, states).transpose(1, 2) for _ in range(2))
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        u.new_empty(channels, states),
        *by_step,
        u.new_empty(channels),
        u.new_empty(batch, channels, states),
    )


def _keep_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    backend, u, delta, A, B, C, D, first, _ = inputs
    ctx.backend, ctx.continued = backend, first is not None
    ctx.set_materialize_grads(False)  # that of the checkpoints would be as large as they are
    ctx.save_for_backward(u, delta, A, B, C, D, output[2])


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, _: None) -> tuple:
    u, delta, A, B, C, D, kept = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(u)
    *grads, grad_d, grad_first = _backward(ctx.backend, u, delta, A, B, C, D, kept, grad, grad_last)
    return None, *grads, None if D is None else grad_d, grad_first if ctx.continued else None, None


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError('selective_scan cannot be differentiated twice: choose backend="reference" for that')


_forward.register_autograd(_differentiate, setup_context=_keep_inputs)
_backward.register_autograd(_refuse)

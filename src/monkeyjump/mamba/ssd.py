"""The scan of Mamba-2 as matrix products: state space duality (Dao and Gu 2024, "Transformers are SSMs", section 6).

    h[t] = exp(dt[t] A) h[t - 1] + dt[t] x[t] B[t]^T         per head, h [P, N]
    y[t] = h[t] C[t] + D x[t]

Within a chunk of Q steps the recurrence is a causal matrix, y = (G * decay) (dt x) with G = C B^T; between chunks only
the states h at their ends matter, and these follow one another in a short loop. The heads of a group share B and C,
so that G, the states of a chunk and what they give to the output are one product per group each, with the heads side by
side as columns: nothing is repeated for a head.

Sums of dt A are taken in float64: their differences, not they, are what is exponentiated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`y` `[B, L, H, P]` in the dtype of `x`; with `return_last_state` also the last state, `[B, H, P, N]`.

    The state is float32 for inputs of half precision, else of the inputs' own precision.

    Args:
        x: `[B, L, H, P]`, H heads of width P.
        dt: `[B, L, H]`, already positive.
        A: `[H]`, negative.
        B, C: `[B, L, G, N]`, G groups that divide the heads.
        D: `[H]`, the skip connection, or None for 0.
        initial_state: `[B, H, P, N]` before the first step, or None for zeros.

    Raises:
        ValueError: shapes that do not belong together.
        RuntimeError: when differentiated twice.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state)
    exact = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    size = min(CHUNK, max(length, 1))
    x_, dt_, b, c = (_chunks(t.to(exact), size) for t in (x, dt, B, C))
    chunks = x_.shape[1]
    logs = (dt_ * A.to(exact)).double().cumsum(2)  # [B, chunks, Q, H]
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # [B, chunks, G, Q, N]
    within, _ = _within_chunks(x_, dt_, logs, c @ b.transpose(3, 4))
    first = None if initial_state is None else initial_state.to(exact)
    starts, last = _states(x_, dt_, logs, b, first)
    # C times the starts [B, chunks, G, N, heads of G * P]
    side_by_side = starts.view(batch, chunks, groups, heads // groups * width, states).transpose(3, 4)
    across = (c @ side_by_side).transpose(2, 3).reshape(batch, chunks, size, heads, width)
    y = torch.addcmul(_per_head(within), across, logs.exp().to(exact)[..., None]).flatten(1, 2)[:, :length]
    if D is not None:
        y = torch.addcmul(y, x.to(exact), D.to(exact)[:, None])
    y = y.to(x.dtype)
    return (y, last) if return_last_state else y


@torch.library.custom_op("monkeyjump::ssd_within_chunks", mutates_args=())
def _within_chunks(x: Tensor, dt: Tensor, logs: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What the steps of a chunk give to each other, `[B, chunks, H, Q, P]`, and the decays `[B, chunks, H, Q, Q]`.

    Args:
        x: `[B, chunks, Q, H, P]`.
        dt, logs: `[B, chunks, Q, H]`; logs are sums of dt A from the chunk's beginning, float64.
        g: `[B, chunks, G, Q, Q]`.
    """
    rows, up, down = _exponents(logs, x.dtype)
    future = torch.full((x.shape[2],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)
    decay = (rows - rows.transpose(3, 4)).add_(future).exp_()
    columns = _product(_per_head(x), _per_head(dt)[..., None] * down)
    return (_scores(decay, g) @ columns).mul_(up), decay


@torch.library.custom_op("monkeyjump::ssd_within_chunks_backward", mutates_args=())
def _within_chunks_backward(
    x: Tensor, dt: Tensor, logs: Tensor, g: Tensor, decay: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, logs and g, given that of the first output."""
    _, up, down = _exponents(logs, x.dtype)
    scale = _per_head(dt)[..., None] * down
    grad, columns = _product(grad, up), _product(_per_head(x), scale)
    grad_columns = _scores(decay, g).transpose(3, 4) @ grad
    inner = (grad @ columns.transpose(3, 4)).mul_(decay).unflatten(2, (g.shape[2], -1))
    grad_g = inner.sum(3)
    inner = inner.mul_(g[:, :, :, None]).flatten(2, 3)
    inner.diagonal(dim1=3, dim2=4).zero_()  # the decay of no step is 1 whatever the logs are
    grad_logs = inner.sum(4) - inner.sum(3)
    grad_dt = (grad_columns * _per_head(x)).sum(4) * down.squeeze(4)
    grad_x = _product(_per_head(grad_columns), _per_head(scale))
    return grad_x, *(_per_head(t).contiguous() for t in (grad_dt, grad_logs.double())), grad_g


def _exponents(logs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The logs as `[B, chunks, H, Q, 1]` in `dtype`, and what rounding left: a factor of rows and one of columns."""
    logs = _per_head(logs)[..., None]
    rows = logs.to(dtype)
    rest = (logs - rows.double()).to(dtype)
    return rows, rest.exp(), (-rest).exp()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a * b` in the shape of `a`, contiguous whatever the strides of `a`."""
    return torch.mul(a, b, out=a.new_empty(a.shape))


def _per_head(t: Tensor) -> Tensor:
    """`[B, chunks, Q, H, ...]` as `[B, chunks, H, Q, ...]`, and back."""
    return t.transpose(2, 3)


def _scores(decay: Tensor, g: Tensor) -> Tensor:
    """`decay` `[B, chunks, H, Q, Q]` times the `g` `[B, chunks, G, Q, Q]` of the head's group."""
    return (decay.unflatten(2, (g.shape[2], -1)) * g[:, :, :, None]).flatten(2, 3)


def _states(x: Tensor, dt: Tensor, logs: Tensor, b: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states at the beginnings of the chunks `[B, chunks, H, P, N]` and the last one `[B, H, P, N]`.

    Args:
        x, dt, logs: as in `_within_chunks`.
        b: `[B, chunks, G, Q, N]`.
        first: `[B, H, P, N]` or None.
    """
    batch, chunks, size, heads, width = x.shape
    groups, states = b.shape[2], b.shape[4]
    kept = (logs[:, :, -1:] - logs).exp().to(x.dtype) * dt  # [B, chunks, Q, H]
    columns = (x * kept[..., None]).view(batch, chunks, size, groups, heads // groups * width)
    added = columns.permute(0, 1, 3, 4, 2) @ b  # [B, chunks, G, heads of G * P, N]
    decay = logs[:, :, -1].exp().to(x.dtype)[..., None, None]  # [B, chunks, H, 1, 1]
    h = x.new_zeros(batch, heads, width, states) if first is None else first
    starts = []
    for of_chunk, factor in zip(added.view(batch, chunks, heads, width, states).unbind(1), decay.unbind(1)):
        starts.append(h)
        h = torch.addcmul(of_chunk, factor, h)
    return torch.stack(starts, 1), h


@_within_chunks.register_fake
def _within_shapes(x, dt, logs, g):
    batch, chunks, size, heads, width = x.shape
    return x.new_empty(batch, chunks, heads, size, width), x.new_empty(batch, chunks, heads, size, size)


@_within_chunks_backward.register_fake
def _within_backward_shapes(x, dt, logs, g, decay, grad):
    return tuple(t.new_empty(t.shape) for t in (x, dt, logs, g))


def _keep_inputs(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return _within_chunks_backward(*ctx.saved_tensors, grad)


def _refuse(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("ssd_scan cannot be differentiated twice")


_within_chunks.register_autograd(_differentiate, setup_context=_keep_inputs)
_within_chunks_backward.register_autograd(_refuse)


def _chunks(t: Tensor, size: int) -> Tensor:
    """`[B, L, ...]` as `[B, chunks, size, ...]`, zeros behind the last step: with dt zero, they change no state."""
    missing = -t.shape[1] % size if t.shape[1] else size
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (t.shape[1] // size, size))


def _check_shapes(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"x must be [B, L, H, P] and B [B, L, G, N]; they are {list(x.shape)} and {list(B.shape)}")
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    if heads % groups:
        raise ValueError(f"the {heads} heads of x must divide among the {groups} groups of B")
    wanted = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, states)),
        "C": (C, (batch, length, groups, states)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (batch, heads, width, states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}; with x {list(x.shape)} and B {list(B.shape)} "
                f"it must have {list(shape)}"
            )

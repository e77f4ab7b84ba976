"""The recurrence in torch, for every device and dtype: a loop over the steps that does little else than multiply-add.

The steps go in chunks, time first, so that what a chunk needs for all its steps at once (decays, what is added, the
sums over states) are a few operations on `[CHUNK, B, D, N]`, small enough for a cache, and one step is a single fused
multiply-add on `[B, D, N]`. The forward pass keeps the states at the beginnings of the chunks (checkpoints); the
backward pass computes those in between again and walks back by the formulas in `native/selective_scan.c`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 16


def kept_shape(u: Tensor, states: int) -> tuple[int, ...]:
    """The shape of the checkpoints."""
    batch, channels, length = u.shape
    return -(-length // CHUNK), batch, channels, states


class _Chunk(NamedTuple):
    """The inputs of K steps: u, delta `[K, B, D]`, B, C `[K, B, N]`."""

    u: Tensor
    delta: Tensor
    b: Tensor
    c: Tensor


class _Room(NamedTuple):
    """Buffers `[CHUNK, B, D, N]` that every chunk uses again."""

    h: Tensor
    decay: Tensor


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, first: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` `[B, D, L]`, the last state `[B, D, N]` and the checkpoints (empty unless asked to `keep` them).

    Args:
        u, delta, A, B, C, D, first: as in `reference.scan`.
    """
    states = A.shape[1]
    y, kept = torch.empty_like(u), u.new_empty(kept_shape(u, states) if keep else 0)
    h = u.new_zeros(*u.shape[:2], states) if first is None else first
    room = _room(u, states)
    for at, chunk in enumerate(_chunks(u, delta, B, C)):
        if keep:
            kept[at] = h
        inside, _ = _states(chunk, A, h, room)
        y[:, :, at * CHUNK : (at + 1) * CHUNK] = (inside @ chunk.c[..., None]).squeeze(3).permute(1, 2, 0)
        h = inside[-1].clone()
    if D is not None:
        y.addcmul_(u, D[:, None])
    return y, h.clone() if h is first else h, kept


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    kept: Tensor,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D (as if it were there) and of the first state, in their shapes.

    Args:
        u, delta, A, B, C, D, kept: what `forward` took and gave.
        grad, grad_last: `[B, D, L]` of y, `[B, D, N]` of the last state or None.
    """
    (batch, channels, length), states = u.shape, A.shape[1]
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_a, (grad_b, grad_c) = torch.zeros_like(A), (u.new_empty(batch, length, states) for _ in range(2))
    carried = u.new_zeros(batch, channels, states) if grad_last is None else grad_last
    room, chunks, outs = _room(u, states), _chunks(u, delta, B, C), grad.permute(2, 0, 1).split(CHUNK)
    for at in reversed(range(len(chunks) if length else 0)):
        parts, carried = _walk_back(chunks[at], A, kept[at], outs[at], carried, room)
        here = slice(at * CHUNK, (at + 1) * CHUNK)
        grad_u[:, :, here], grad_delta[:, :, here] = (part.permute(1, 2, 0) for part in parts[:2])
        grad_b[:, here], grad_c[:, here] = (part.transpose(0, 1) for part in parts[2:4])
        grad_a += parts[4]
    if D is not None:
        grad_u.addcmul_(grad, D[:, None])
    grad_d = (grad * u).sum((0, 2))
    first = carried.clone() if carried is grad_last else carried
    return grad_u, grad_delta, grad_a, grad_b.transpose(1, 2), grad_c.transpose(1, 2), grad_d, first


def _chunks(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> list[_Chunk]:
    if not u.shape[2]:
        return []
    return [_Chunk(*parts) for parts in zip(*(t.permute(2, 0, 1).contiguous().split(CHUNK) for t in (u, delta, B, C)))]


def _room(u: Tensor, states: int) -> _Room:
    shape = (min(CHUNK, u.shape[2]), *u.shape[:2], states)
    return _Room(u.new_empty(shape), u.new_empty(shape))


def _states(chunk: _Chunk, A: Tensor, h: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
    """The states after each step and the decays, `[K, B, D, N]`, in the buffers."""
    steps = len(chunk.u)
    decay, inside = room.decay[:steps], room.h[:steps]
    torch.mul(chunk.delta[..., None], A, out=decay).exp_()
    torch.mul((chunk.delta * chunk.u)[..., None], chunk.b[:, :, None], out=inside)
    for here, e in zip(inside.unbind(), decay.unbind()):
        h = here.addcmul_(e, h)
    return inside, decay


def _walk_back(
    chunk: _Chunk, A: Tensor, h: Tensor, grad: Tensor, carried: Tensor, room: _Room
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Gradients of u, delta, B, C, A from one chunk, and that of the state before it."""
    inside, decay = _states(chunk, A, h, room)
    g = grad[..., None] * chunk.c[:, :, None]
    for here, e in zip(reversed(g.unbind()), reversed(decay.unbind())):
        carried = here.add_(carried) * e
    grad_c = (grad[:, :, None] @ inside).squeeze(2)
    grad_b = ((chunk.delta * chunk.u)[:, :, None] @ g).squeeze(2)
    added = (g @ chunk.b[..., None]).squeeze(3)
    w = g.mul_(decay)
    w[0] *= h
    w[1:] *= inside[:-1]
    grad_delta = torch.linalg.vecdot(w, A) + chunk.u * added
    grad_a = w.mul_(chunk.delta[..., None]).sum((0, 1))
    return (chunk.delta * added, grad_delta, grad_b, grad_c, grad_a), carried

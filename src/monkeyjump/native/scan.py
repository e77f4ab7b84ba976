"""The compiled selective scan as functions of tensors, float32 on the CPU: `native/selective_scan.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from monkeyjump.native.library import library

# as in selective_scan.c
TILE = 16  # channels that go together
CHUNK = 16  # steps between two checkpoints
GROUP = 4  # tiles whose gradients of B and C are summed before they are written
MOST_STATES = 256
WORTH_THREADS = 1 << 14  # states; waking the threads takes longer than fewer do


def is_compiled() -> bool:
    """Whether the kernels were compiled and are switched on."""
    return library() is not None


def kept_shape(u: Tensor, states: int) -> tuple[int, ...]:
    """The shape of the checkpoints: the states at the beginnings of the chunks, tile by tile."""
    batch, channels, length = u.shape
    return batch, _parts(channels, TILE), _parts(length, CHUNK), states, TILE


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, first: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`y` `[B, D, L]`, the last state `[B, D, N]` and the checkpoints (empty unless asked to `keep` them).

    Args:
        u, delta: `[B, D, L]`, any strides.
        A, first: `[D, N]`, `[B, D, N]` or None.
        B, C: `[B, N, L]`.
        D: `[D]` or None.
    """
    (batch, channels, length), states = u.shape, A.shape[1]
    b, c, a = _by_step(B), _by_step(C), A.contiguous()
    skip, start = _dense(D), _dense(first)
    y, last = torch.empty_like(u), u.new_empty(batch, channels, states)
    kept = u.new_empty(kept_shape(u, states) if keep else 0)
    sizes = (batch, channels, length, states, _threads(u, states))
    inputs = (*map(_at, (u, delta, a, b, c, skip, start)), _strides(u, delta, y))
    _lib().mj_scan_forward(*inputs, *sizes, _at(y), _at(last), _at(kept) if keep else None)
    return y, last, kept


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

    Raises:
        MemoryError: no room for what the threads carry.
    """
    (batch, channels, length), states = u.shape, A.shape[1]
    b, c, a = _by_step(B), _by_step(C), A.contiguous()
    skip, end = _dense(D), _dense(grad_last)
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(delta)
    grad_a, grad_first = (u.new_empty(batch, channels, states) for _ in range(2))
    grad_skip = u.new_empty(batch, channels)
    grad_b, grad_c = (u.new_empty(batch, _parts(channels, TILE * GROUP), length, states) for _ in range(2))
    inputs = (*map(_at, (u, delta, a, b, c, skip, kept, grad, end)), _strides(u, delta, grad, grad_u, grad_delta))
    sizes = (batch, channels, length, states, _threads(u, states))
    outputs = map(_at, (grad_u, grad_delta, grad_a, grad_b, grad_c, grad_first, grad_skip))
    if _lib().mj_scan_backward(*inputs, *sizes, *outputs):
        raise MemoryError("the scan found no memory for what its threads carry")
    grad_b, grad_c = (g.sum(1).transpose(1, 2) for g in (grad_b, grad_c))
    return grad_u, grad_delta, grad_a.sum(0), grad_b, grad_c, grad_skip.sum(0), grad_first


def _lib() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask is_compiled() first"
    return found


def _by_step(t: Tensor) -> Tensor:
    """`[B, N, L]` as contiguous `[B, L, N]`."""
    return t.transpose(1, 2).contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _strides(*tensors: Tensor) -> ctypes.Array:
    numbers = [stride for t in tensors for stride in t.stride()]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def _threads(u: Tensor, states: int) -> int:
    return torch.get_num_threads() if u.numel() * states >= WORTH_THREADS else 1

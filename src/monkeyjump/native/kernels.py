"""The kernels as functions of tensors."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from monkeyjump.native.library import library

LANES = 8  # elements that a kernel takes at a time: every width is a multiple of it
MOST_RANK = 8
PLAIN = (Tensor, nn.Parameter)  # a subclass may hold its numbers elsewhere, or not at all
WORTH_THREADS = 1 << 15  # elements; waking the threads takes longer than fewer do


def is_traced() -> bool:
    """Whether torch.compile or torch.func looks on: neither sees through a kernel or an operation of ours."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_there() -> bool:
    """Whether the kernels were compiled, are switched on, and nobody traces."""
    return not is_traced() and library() is not None


def serves(*wide: Tensor | None) -> bool:
    """Whether the kernels are there and take these tensors: plain float32 on the CPU, widths of whole lanes.

    Args:
        wide: their last dimension is the one that is passed over; None is no tensor.
    """
    if not is_there():
        return False
    for t in wide:  # noqa: SIM110  all() is slower, and this stands in the way of every token that is decoded
        if t is not None and (t.shape[-1] % LANES or not _is_plain(t)):
            return False
    return True


def serves_update(a: Tensor, b: Tensor, *wide: Tensor | None) -> bool:
    """As `serves`, for an update with A `[r, d_in]` and B `[d_out, r]`; of a higher rank, torch's BLAS is as fast."""
    return a.shape[0] <= MOST_RANK and b.shape[0] % LANES == 0 and serves(a, *wide) and _is_plain(b)


def _is_plain(t: Tensor) -> bool:
    return type(t) in PLAIN and t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous()


def low_rank_forward(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, gate: Tensor | None, scale: float, bits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`y = u B^T + bias` `[N, d_out]` and `u = (keep * x) A^T * gate * scale` `[N, r]`.

    Args:
        x: `[N, d_in]`.
        a, b: `[r, d_in]`, `[d_out, r]`.
        bias: `[d_out]` or None.
        gate: `[N, 1]` of any stride, or None for 1.
        bits: one bit for each element of x, or None.

    Raises:
        MemoryError: no room for B transposed.
    """
    (rows, d_in), (d_out, rank) = x.shape, b.shape
    u, y, gate = x.new_empty(rows, rank), x.new_empty(rows, d_out), _float32(gate)
    sizes = (_stride(gate), rows, d_in, d_out, rank, scale, _threads(rows * (d_in + d_out)))
    inputs = (_at(x), _at(a), _at(b), _at(bias), _at(gate), _at(bits))
    _check(_lib().mj_low_rank_forward(*inputs, *sizes, _at(u), _at(y)))
    return y, u


def low_rank_backward(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    gate: Tensor | None,
    scale: float,
    bits: Tensor | None,
    wants_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The update's gradients of x (None unless wanted), A (None where x is None) and B.

    Args:
        grad: `[N, d_out]`.
        x, a, b, gate, scale, bits: as in `low_rank_forward`.
        u: what that returned.

    Raises:
        MemoryError: no room for the sums of the threads.
    """
    (rows, d_out), (rank, d_in) = grad.shape, a.shape
    grad_x = grad.new_empty(rows, d_in) if wants_x else None
    grad_a, grad_b, gate = None if x is None else torch.empty_like(a), torch.empty_like(b), _float32(gate)
    sizes = (_stride(gate), rows, d_in, d_out, rank, scale, _threads(rows * (d_in + d_out)))
    inputs = (_at(grad), _at(x), _at(a), _at(b), _at(u), _at(gate), _at(bits))
    _check(_lib().mj_low_rank_backward(*inputs, *sizes, _at(grad_x), _at(grad_a), _at(grad_b)))
    return grad_x, grad_a, grad_b


def scale_forward(y: Tensor, gain: Tensor, gate: Tensor) -> Tensor:
    """`y * (1 + gate * gain)` for `y` `[N, d_out]`, `gain` `[d_out]`, `gate` `[N, 1]`."""
    (rows, width), gate = y.shape, gate.float()
    out = torch.empty_like(y)
    _lib().mj_scale_forward(_at(y), _at(gain), _at(gate), rows, width, _threads(y.numel()), _at(out))
    return out


def scale_backward(grad: Tensor, y: Tensor, gain: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `y` and `gain` in `scale_forward`, given that of what it returned.

    Raises:
        MemoryError: no room for the sums of the threads.
    """
    (rows, width), gate = y.shape, gate.float()
    grad_y, grad_gain = torch.empty_like(grad), torch.empty_like(gain)
    inputs = (_at(grad), _at(y), _at(gain), _at(gate))
    _check(_lib().mj_scale_backward(*inputs, rows, width, _threads(y.numel()), _at(grad_y), _at(grad_gain)))
    return grad_y, grad_gain


def draw_bits(seed: int, keep: int, words: int) -> Tensor:
    """`[words]` int64 whose bits are each 1 with probability keep / 2^16."""
    bits = torch.empty(words, dtype=torch.int64)
    _lib().mj_dropout_bits(seed % 2**64, keep, words, _threads(64 * words), _at(bits))
    return bits


def route(
    h: Tensor, centers: Tensor, experts: int, temperature: float, k: int, total: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates float32 and chosen bool `[N, E]`, logits `[N, C]`, for states `h` `[N, d]` and `centers` `[C, d]`.

    Args:
        experts: E; adapter e takes center e mod C.
        k: how many are chosen.
        total: what the gates of the chosen sum to; 0: their share of the softmax over all.

    Raises:
        MemoryError: no room for the norms of the centers.
    """
    (rows, width), count = h.shape, centers.shape[0]
    logits, gates = h.new_empty(rows, count), h.new_empty(rows, experts)
    chosen = torch.empty(rows, experts, dtype=torch.bool)
    sizes = (rows, width, count, experts, k, temperature, total, _threads(rows * width))
    _check(_lib().mj_route(_at(h), _at(centers), *sizes, _at(logits), _at(gates), _at(chosen)))
    return gates, chosen, logits


def center_sums(h: Tensor, assigned: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Sums `[C, d]` and counts `[C]` of the rows of `h` `[N, d]` by bool `assigned` `[N, C]`.

    A row that holds what is not finite is left out.

    Args:
        unit: sum the rows as unit vectors.

    Raises:
        MemoryError: no room for the sums of the threads.
    """
    (rows, width), count = h.shape, assigned.shape[1]
    sums, counts = h.new_empty(count, width), h.new_empty(count)
    sizes = (rows, width, count, int(unit), _threads(rows * width))
    _check(_lib().mj_center_sums(_at(h), _at(assigned.contiguous()), *sizes, _at(sums), _at(counts)))
    return sums, counts


def _lib() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask serves() first"
    return found


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float32(gate: Tensor | None) -> Tensor | None:
    """A gate as the kernels read it, whatever it was given as."""
    return gate if gate is None or gate.dtype == torch.float32 else gate.float()


def _stride(gate: Tensor | None) -> int:
    return 0 if gate is None else gate.stride(0)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= WORTH_THREADS else 1


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the kernels found no memory for their sums")

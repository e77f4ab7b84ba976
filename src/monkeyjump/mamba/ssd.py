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
    """
    _check_shapes(x, dt, A, B, C, D, initial_state)
    exact = torch.promote_types(x.dtype, torch.float32)
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    size = min(CHUNK, max(length, 1))
    x_, dt_, b, c = (_chunks(t.to(exact), size) for t in (x, dt, B, C))
    chunks = x_.shape[1]
    logs = (dt_ * A.to(exact)).double().cumsum(2)  # [B, chunks, Q, H]
    within = _within_chunks(x_ * dt_[..., None], logs, b, c)
    first = None if initial_state is None else initial_state.to(exact)
    starts, last = _states(x_ * dt_[..., None], logs, b, first)
    # C [B, chunks, G, Q, N] times the starts [B, chunks, G, N, heads of G * P]
    side_by_side = starts.view(batch, chunks, groups, heads // groups * width, states).transpose(3, 4)
    across = (c.transpose(2, 3) @ side_by_side).view(batch, chunks, groups, size, heads // groups, width)
    across = across.transpose(3, 4).flatten(2, 3) * logs.exp().to(exact).transpose(2, 3)[..., None]
    y = (within + across).transpose(2, 3).flatten(1, 2)[:, :length]
    if D is not None:
        y = torch.addcmul(y, x.to(exact), D.to(exact)[:, None])
    y = y.to(x.dtype)
    return (y, last) if return_last_state else y


def _within_chunks(x: Tensor, logs: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """What the steps of a chunk give to each other, `[B, chunks, H, Q, P]`.

    Args:
        x: `[B, chunks, Q, H, P]`, times dt.
        logs: `[B, chunks, Q, H]`, sums of dt A from the chunk's beginning, float64.
        b, c: `[B, chunks, Q, G, N]`.
    """
    size, heads, groups = x.shape[2], x.shape[3], b.shape[3]
    coarse = logs.to(x.dtype)
    fine = (logs - coarse.double()).to(x.dtype).detach()  # the rest, exp of which is a factor of rows and of columns
    rows = coarse.transpose(2, 3)[..., None]  # [B, chunks, H, Q, 1]
    future = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    decay = (rows - rows.transpose(3, 4)).masked_fill(future, -torch.inf).exp()
    g = c.transpose(2, 3) @ b.permute(0, 1, 3, 4, 2)  # [B, chunks, G, Q, Q]
    scores = decay.unflatten(2, (groups, heads // groups)) * g[:, :, :, None]
    fine = fine.transpose(2, 3)[..., None]
    return (scores.flatten(2, 3) @ (x.transpose(2, 3) * (-fine).exp())) * fine.exp()


def _states(x: Tensor, logs: Tensor, b: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states at the beginnings of the chunks `[B, chunks, H, P, N]` and the last one `[B, H, P, N]`.

    Args:
        x, logs, b: as in `_within_chunks`.
        first: `[B, H, P, N]` or None.
    """
    batch, chunks, size, heads, width = x.shape
    groups, states = b.shape[3:]
    kept = (logs[:, :, -1:] - logs).exp().to(x.dtype)  # [B, chunks, Q, H]
    columns = (x * kept[..., None]).view(batch, chunks, size, groups, heads // groups * width)
    added = columns.permute(0, 1, 3, 4, 2) @ b.transpose(2, 3)  # [B, chunks, G, heads of G * P, N]
    decay = logs[:, :, -1].exp().to(x.dtype)[..., None, None]  # [B, chunks, H, 1, 1]
    h = x.new_zeros(batch, heads, width, states) if first is None else first
    starts = []
    for of_chunk, factor in zip(added.view(batch, chunks, heads, width, states).unbind(1), decay.unbind(1)):
        starts.append(h)
        h = torch.addcmul(of_chunk, factor, h)
    return torch.stack(starts, 1), h


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

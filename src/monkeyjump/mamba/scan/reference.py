"""The recurrence as a plain loop, for autograd to differentiate: what the other backends are tested against.

The steps are unbound, not indexed: the gradient of an index is a tensor of zeros of the full size for every step, which
is what makes Hugging Face's own loop quadratic in the length.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`y` `[B, D, L]` and the last state `[B, D, N]`, in the dtype of the arguments.

    Args:
        u, delta: `[B, D, L]`.
        A: `[D, N]`.
        B, C: `[B, N, L]`.
        D: `[D]`, or None for zeros.
        first: `[B, D, N]`, or None for zeros.
    """
    h = u.new_zeros(*u.shape[:2], A.shape[1]) if first is None else first
    ys = []
    for x, step, b, c in zip(*(t.unbind(2) for t in (u, delta, B, C))):
        h = torch.exp(step[:, :, None] * A) * h + (step * x)[:, :, None] * b[:, None]
        ys.append((h * c[:, None]).sum(2))
    y = torch.stack(ys, 2) if ys else u.clone()
    return y if D is None else y + D[:, None] * u, h

"""The selective scan (Gu and Dao 2023, "Mamba", algorithm 2): what a caller sees of it.

    step = softplus(delta + delta_bias)                          [B, D, L]
    h[t] = exp(step[t] A) * h[t - 1] + step[t] u[t] B[t]         [B, D, N]
    y[t] = (sum_n h[t] C[t]  +  D u[t]) * silu(z[t])             [B, D, L]

The backends differ in how they take the recurrence in the middle, with the sums over its states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monkeyjump.mamba.scan import cuda, op, reference
from monkeyjump.mamba.scan.choice import choose


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str = "auto",
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`y` `[B, D, L]` in the dtype of `u`; with `return_last_state` also the state after the last step.

    The state is float32 for inputs of half precision, else of the inputs' own precision. Any strides will do.

    Args:
        u, delta: `[B, D, L]`.
        A: `[D, N]`, negative in a Mamba; `delta * A` beyond +-87 counts as 87 in the compiled kernel.
        B, C: `[B, N, L]`.
        D: `[D]`, the skip connection, or None for 0.
        z: `[B, D, L]`, the gate, or None for none.
        delta_bias: `[D]`, added to delta before the softplus.
        delta_softplus: whether delta is passed through softplus.
        backend: "cuda" (mamba-ssm's kernel), "native" (ours, compiled, float32 on a CPU), "chunked" (torch, any
            device), "reference" (a plain loop, the only one that can be differentiated twice) or "auto": the first of
            these that is there for the tensors, logged once.
        return_last_state: return `(y, last)`, `last` `[B, D, N]`.
        initial_state: `[B, D, N]` before the first step, or None for zeros.

    Raises:
        ValueError: shapes that do not belong together; u of whole numbers; a backend that does not exist or does not
            take these tensors.
        RuntimeError: the backend is not installed; on a second differentiation, except of "reference".
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    name = choose(backend, u, A.shape[1], initial_state is not None)
    if name == "cuda":
        y, last = cuda.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, last) if return_last_state else y
    exact = torch.promote_types(u.dtype, torch.float32)
    x, step, a, b, c = (t.to(exact) for t in (u, delta, A, B, C))
    d, first = (None if t is None else t.to(exact) for t in (D, initial_state))
    if delta_bias is not None:
        step = step + delta_bias.to(exact)[:, None]
    if delta_softplus:
        step = F.softplus(step)
    recurrence = (x, step, a, b, c, d, first)
    y, last = reference.scan(*recurrence) if name == "reference" else op.scan(name, *recurrence)
    if z is not None:
        y = y * F.silu(z.to(exact))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def _check_shapes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | None) -> None:
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"u must be [B, D, L] and A [D, N]; their shapes are {list(u.shape)} and {list(A.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"u is {str(u.dtype).removeprefix('torch.')}; a scan needs floating-point numbers")
    (batch, channels, length), states = u.shape, A.shape[1]
    D, z, delta_bias, initial_state = others
    wanted = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, length)),
        "C": (C, (batch, states, length)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has the shape {list(tensor.shape)}; with u {list(u.shape)} and A {list(A.shape)} "
                f"it must have {list(shape)}"
            )

"""What is public of the scan, and its checks."""

from __future__ import annotations

from torch import Tensor

from monkeyjump.mamba.ssd.op import exact_dtype, scan


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
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=exact_dtype(x))
    y, last, _ = scan(x, dt, A, B, C, D, initial_state)
    return (y, last) if return_last_state else y


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

"""Checks of values that only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_rows(bad: Tensor, message: str, **values: Tensor) -> None:
    """Refuse a batch with bad rows.

    Compiled code cannot ask the device for an answer in the middle of a graph: there the check travels with
    the graph, fails as a RuntimeError and cannot name the row.

    Args:
        bad: bool `[B]`.
        message: the error; its fields `{row}` and the names of `values` are filled in for the first bad row.
        values: `[B]` each.

    Raises:
        ValueError: a row is bad.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(~bad.any(), message)
    elif bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(message.format(row=row, **{name: value[row].item() for name, value in values.items()}))

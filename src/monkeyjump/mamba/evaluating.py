"""Passes over data that measure: evaluation mode, padding left out, everything as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Batch = Mapping[str, Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def attended(values: Tensor, batch: Batch) -> Tensor:
    """`[B, T, D]` -> `[tokens, D]` without the padding that the batch's attention mask names."""
    mask = batch.get("attention_mask")
    return values.flatten(0, 1) if mask is None else values[mask.bool()]

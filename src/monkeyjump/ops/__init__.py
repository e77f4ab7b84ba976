"""Fused operations, each with a slow reference beside it."""

from monkeyjump.ops.low_rank import gated_delta, gated_linear, gated_linear_reference

__all__ = ["gated_delta", "gated_linear", "gated_linear_reference"]

"""Fused operations, each with a slow reference beside it."""

from monkeyjump.ops.dropout import DropoutMask
from monkeyjump.ops.low_rank import gated_delta, gated_linear, gated_linear_reference
from monkeyjump.ops.mixture import (
    mixture_delta,
    mixture_delta_reference,
    mixture_linear,
    mixture_scale,
    mixture_scale_reference,
    router_logits,
)
from monkeyjump.ops.scale import gated_scale, gated_scale_reference

__all__ = [
    "DropoutMask",
    "gated_delta",
    "gated_linear",
    "gated_linear_reference",
    "gated_scale",
    "gated_scale_reference",
    "mixture_delta",
    "mixture_delta_reference",
    "mixture_linear",
    "mixture_scale",
    "mixture_scale_reference",
    "router_logits",
]

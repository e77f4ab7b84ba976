"""Adapted layers of the LoRA family that take the fused operations of `monkeyjump.ops`.

They are PEFT's own layers with another forward: everything else (files, switching, merging, variants)
stays PEFT's, and whatever the fused operations do not cover (several adapters at once, DoRA, mixed
batches, compiled or functorch code, a bias in B) goes PEFT's way.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.native import is_traced
from monkeyjump.ops import DropoutMask, gated_delta, gated_linear
from monkeyjump.tuner.gates import CANNOT_MERGE, AppliesGate, RoutedLora, gate_of

PLAIN = (nn.Linear, Conv1D)  # layers whose forward is one product


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA layer; one routed, shared or plain adapter takes the fused update."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter = _sole_adapter(self, args, kwargs)
        if adapter is None or not isinstance(self.lora_variant.get(adapter), (RoutedLora, type(None))):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        # a shard, or an offloaded weight, comes with its module's own call
        if is_hooked(a) or is_hooked(b) or b.bias is not None:
            return super().forward(x, *args, **kwargs)
        return _fused(self, adapter, x, a.weight, b.weight, self.scaling[adapter])


class FusedSVDLinear(SVDLinear, AppliesGate):
    """PEFT's AdaLoRA layer: the same update with A = diag(lambda) Q."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged and any(gate_of(self, adapter) is not None for adapter in self.merged_adapters):
            raise ValueError(CANNOT_MERGE)
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        sole = _sole_adapter(self, args, kwargs)
        if sole is not None:
            a, b, scale = self._factors(sole)
            return _fused(self, sole, x, a, b, scale)
        y = self.base_layer(x, *args, **kwargs)
        for adapter in [name for name in self.active_adapters if name in self.lora_A]:
            (a, b, scale), gate = self._factors(adapter), gate_of(self, adapter)
            u = self.lora_dropout[adapter](x).to(a.dtype) @ a.T
            y = y + ((u * scale if gate is None else u * (gate(x) * scale).to(u.dtype)) @ b.T).to(y.dtype)
        return y

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """`diag(lambda) Q` `[r, d_in]`, P `[d_out, r]` and PEFT's scale."""
        scale = self.scaling[adapter] / (self.r[adapter] + 1e-5)
        return self.lora_A[adapter] * self.lora_E[adapter], self.lora_B[adapter], scale


def fuse(layer: nn.Module) -> None:
    """Give a layer that PEFT made the fused forward, where there is one for its class."""
    for fused, original in ((FusedLoraLinear, LoraLinear), (FusedSVDLinear, SVDLinear)):
        if type(layer) is original:
            layer.__class__ = fused


def _sole_adapter(layer: Any, args: tuple, kwargs: dict) -> str | None:
    """The one adapter that acts, or None where the fused operations do not serve."""
    if args or kwargs or layer.disable_adapters or layer.merged or is_traced():
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.r]
    return active[0] if len(active) == 1 else None


def _fused(layer: Any, adapter: str, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    gate = gate_of(layer, adapter)
    dropout = _dropout(layer, adapter, x)
    base = layer.base_layer
    m = None
    if gate is not None:
        if gate.trains():  # a trainable router: the gate's own gradient is left to autograd
            y = base(x)
            return y + gated_delta(x.to(y.dtype), a, b, None, scale, dropout) * gate(x).to(y.dtype)
        m, scale = gate.scaled(x, scale), 1.0
    weight, bias = (None, None) if type(base) not in PLAIN or is_hooked(base) else (base.weight, base.bias)
    if weight is None or not is_frozen_like(weight, bias, x):
        y = base(x)
        return y + gated_delta(x.to(y.dtype), a, b, m, scale, dropout)
    return gated_linear(x, weight.T if type(base) is Conv1D else weight, bias, a, b, m, scale, dropout)


def _dropout(layer: Any, adapter: str, x: Tensor) -> DropoutMask | None:
    """The mask of the dropout on the adapter's input; None where there is none."""
    module = layer.lora_dropout[adapter]
    if not (isinstance(module, nn.Dropout) and module.training and module.p):
        return None
    box = layer.__dict__.get("jump_box")
    return DropoutMask.draw(x, module.p) if box is None else box.dropout_mask(x, module.p)


def is_frozen_like(weight: Tensor, bias: Tensor | None, x: Tensor) -> bool:
    """Whether a layer's weight is nothing but numbers in the dtype and place of `x`, and not trained itself."""
    if type(weight) is not nn.Parameter or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False  # quantized, sharded, or trained
    same = weight.dtype == x.dtype and weight.device == x.device
    return same and not torch.is_autocast_enabled(x.device.type)


def is_hooked(module: Any) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__

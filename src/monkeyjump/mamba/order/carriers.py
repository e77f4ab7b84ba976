"""Which parameters hold an axis of a weight, adapters and masks on it included.

A weight `W [out, in]` with low-rank adapters `B [out, r]`, `A [r, in]` holds its rows in `W` and `B`, its columns in
`W` and `A`: an order of the rows moves both. Known are PEFT's LoRA and IA³, allocated adapters, and
parametrizations that say it themselves through `channel_axes`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monkeyjump.allocation.parametrization import Adapter, parameters_along

Carrier = tuple[nn.Parameter, int]  # parameter, axis


@runtime_checkable
class MovesWithChannels(Protocol):
    """A parametrization that can follow an order of its weight's rows (axis 0) or columns (axis 1)."""

    def channel_axes(self, axis: int) -> list[Carrier]:
        """Its parameters that are indexed by the weight's `axis`, each with the axis it lies on."""


def carriers(owner: Any, name: str, axis: int, where: str) -> list[Carrier]:
    """Every parameter with the channels on `axis` of `owner.name`; `where` names the owner in errors.

    Raises `ValueError` where something sits on the weight that cannot be moved.
    """
    if isinstance(owner, BaseTunerLayer):
        return [*carriers(owner.base_layer, name, axis, where), *_adapter_axes(owner, name, axis, where)]
    if parametrize.is_parametrized(owner, name):
        chain = owner.parametrizations[name]
        found = [(_plain(chain.original, where, name), axis)]
        for step in chain:
            if isinstance(step, MovesWithChannels):
                found += step.channel_axes(axis)
            elif not isinstance(step, Adapter):
                raise ValueError(
                    f"{where}.{name} carries {type(step).__name__}, which does not say how it follows an order of the "
                    f"channels: merge or remove it first, or give it a method channel_axes"
                )
        found += parameters_along(owner, name, axis)[1:]  # those of allocated adapters, after the weight itself
        return found
    return [(_plain(getattr(owner, name), where, name), axis)]


def _plain(tensor: Any, where: str, name: str) -> nn.Parameter:
    if not isinstance(tensor, nn.Parameter) or type(tensor.data) is not Tensor or not tensor.is_floating_point():
        raise ValueError(
            f"{where}.{name} is a {type(tensor.data).__name__} of {tensor.dtype}: its channels can only be moved or "
            f"removed in an unsharded, unquantized model"
        )
    return tensor


def _adapter_axes(layer: BaseTunerLayer, name: str, axis: int, where: str) -> list[Carrier]:
    if isinstance(layer, LoraLayer) and not layer.lora_magnitude_vector and not layer.lora_embedding_A:
        if any(layer.lora_bias.values()):
            raise ValueError(f"lora_bias=True on {where} is not moved with the channels: merge the adapter first")
        factors = layer.lora_B if axis == 0 else layer.lora_A
        return [(factor.weight, axis) for factor in factors.values()] if name == "weight" else []
    if isinstance(layer, IA3Layer):
        scales = axis == (1 if layer.is_feedforward else 0) and name == "weight"
        return [(vector, axis) for vector in layer.ia3_l.values()] if scales else []
    raise ValueError(
        f"{where} carries {type(layer).__name__}, which does not follow an order of the channels: "
        f"merge or unload the adapter first (LoRA and IA3 are moved along)"
    )


def move(parameter: nn.Parameter, axis: int, index: Tensor, states: dict[str, Any]) -> None:
    """Index `parameter`, its gradient and the optimizer's `states` of it along `axis`, in place."""
    with torch.no_grad():
        for tensor in (parameter, parameter.grad, *states.values()):
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                tensor.copy_(tensor.index_select(axis, index.to(tensor.device)))

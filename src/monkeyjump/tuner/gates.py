"""How the gates of a block reach the adapters in it, and how an adapted layer applies its own.

    y = W x + m * delta(x)        m: this slot's gate, [B, T, 1] or [B, 1, 1]

Plain LoRA gates at rank r, `B((A x) * m * s)`, so that nothing as wide as the output is held for it.
Any other method gates the residual, `W x + m * (adapted(x) - W x)`, with the base layer's own output
caught on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.ops import DropoutMask
from monkeyjump.tuner.methods import ADDS_IN_PLACE, BYPASSES_BASE

CANNOT_MERGE = (
    "routed adapters cannot be merged: which of them act differs from token to token, so no single weight "
    "matrix equals them; keep the adapter, or use unload() to take it off"
)


class GateBox:
    """Where a block leaves its gates for the layers inside it while its forward runs."""

    def __init__(self) -> None:
        self.gates: dict[str, Tensor] | None = None
        self._drawn: tuple[Tensor, DropoutMask] | None = None
        self._columns: tuple[Tensor, tuple[float, torch.dtype], tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict:
        return {"gates": None, "_drawn": None, "_columns": None}  # activations: not for pickle or deepcopy

    @contextmanager
    def showing(self, gates: dict[str, Tensor] | None) -> Iterator[None]:
        """Show `gates` to the layers while the block's forward runs."""
        outer, self.gates = self.gates, gates
        try:
            yield
        finally:
            self.gates, self._drawn, self._columns = outer, None, None

    def columns(self, gates: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`gates` `[B, T, E]` times `scale` as E columns `[B T, 1]`, made once for all layers of the block."""
        if self._columns is None or self._columns[0] is not gates or self._columns[1] != (scale, dtype):
            scaled = (gates.reshape(-1, gates.shape[-1]) * scale).to(dtype)
            self._columns = gates, (scale, dtype), scaled.split(1, dim=1)
        return self._columns[2]

    def dropout_mask(self, x: Tensor, p: float) -> DropoutMask:
        """The mask of `x`: layers of the block that read the same `x` share one (rule 8)."""
        if self._drawn is None or self._drawn[0] is not x or self._drawn[1].p != p:
            self._drawn = (x, DropoutMask.draw(x, p))
        return self._drawn[1]


class Gate:
    """The gate of one slot: column `slot` of the block's gates for `adapter`."""

    def __init__(self, box: GateBox, adapter: str, slot: int, name: str) -> None:
        self.box, self.adapter, self.slot, self.name = box, adapter, slot, name

    def __call__(self, x: Tensor) -> Tensor:
        """This slot's gate, broadcastable over the last dimension of `x`.

        Args:
            x: the layer's input, `[B, T, d_in]`, or the same tokens in order as `[B * T, d_in]` or
                `[B, height, width, d_in]`.

        Raises:
            RuntimeError: the layer runs outside its block, or on other tokens than the block's.
        """
        m = self._decided()[..., self.slot]  # [B, T] or [B, 1]
        if x.dim() == 3 and m.shape[0] == x.shape[0] and m.shape[1] in (1, x.shape[1]):
            return m.unsqueeze(-1)
        if x.dim() == 2 and x.shape[0] % m.shape[0] == 0:
            per_row = x.shape[0] // m.shape[0]
            if m.shape[1] in (1, per_row):
                return m.expand(-1, per_row).reshape(-1, 1)
        if x.dim() > 3 and m.shape[0] == x.shape[0]:
            if m.shape[1] == 1:
                return m.reshape(-1, *[1] * (x.dim() - 1))
            if x.shape[1:-1].numel() == m.shape[1]:
                return m.reshape(*x.shape[:-1], 1)
        raise RuntimeError(
            f"{self.name} got an input of shape {tuple(x.shape)}, but its block routed {m.shape[0]} rows of "
            f"{m.shape[1]} tokens; add it to shared_modules"
        )

    def scaled(self, x: Tensor, scale: float) -> Tensor:
        """As calling it, times `scale` and in the dtype of `x`; `[B T, 1]` where each token has a gate of its own."""
        gates = self._decided()
        if x.dim() == 3 and x.shape[:2] == gates.shape[:2]:
            return self.box.columns(gates, scale, x.dtype)[self.slot]
        return (self(x) * scale).to(x.dtype)

    def trains(self) -> bool:
        """Whether the router is learned, so that the gate wants a gradient."""
        return self._decided().requires_grad

    def _decided(self) -> Tensor:
        """The block's gates, `[B, T, E]` or `[B, 1, E]`."""
        if self.box.gates is None or self.adapter not in self.box.gates:
            raise RuntimeError(
                f"{self.name} was called outside its block, so there is no routing decision for it; "
                "call the block, or add the layer to shared_modules"
            )
        return self.box.gates[self.adapter]


def gate_of(layer: BaseTunerLayer, adapter: str) -> Gate | None:
    """The layer's gate for `adapter`; None where it is shared or plain."""
    return layer.__dict__.get("jump_gates", {}).get(adapter)


def install_gate(layer: Any, adapter: str, gate: Gate, method: str) -> None:
    """Make `layer`, adapted by PEFT's `method`, apply `gate` to what `adapter` adds."""
    if "jump_gates" not in layer.__dict__:
        layer.jump_gates = {}
        # PEFT then removes the gate together with the adapter
        layer.other_param_names = (*layer.other_param_names, "jump_gates")
    layer.jump_gates[adapter] = gate
    if isinstance(layer, AppliesGate):
        return
    if _is_plain_lora(layer, adapter):
        layer.lora_variant[adapter] = RoutedLora()
    elif not any(isinstance(_owner(hook), ResidualGate) for hook in layer._forward_hooks.values()):
        residual = ResidualGate(clone_base=method in ADDS_IN_PLACE or not _is_known(layer))
        if method not in BYPASSES_BASE:
            layer.base_layer.register_forward_hook(residual.keep)
        layer.register_forward_hook(residual.apply, with_kwargs=True)


def remove_gates(layer: Any) -> None:
    """Take the residual hooks off again; PEFT discards the adapted layer but keeps its base layer."""
    for hooks in (layer._forward_hooks, layer.base_layer._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(_owner(hook), ResidualGate):
                del hooks[key]


class AppliesGate:
    """Mark of adapted layers of our own, which read their gate themselves."""


class RoutedLora(LoraVariant):
    """Plain LoRA with the gate applied at rank r. PEFT asks a variant for the whole output."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        pass

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        raise ValueError(CANNOT_MERGE)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        raise ValueError(CANNOT_MERGE)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        m = module.jump_gates[active_adapter](x) * module.scaling[active_adapter]
        u = lora_a(module.lora_dropout[active_adapter](x))
        if lora_b.bias is None:
            return result + lora_b(u * m.to(u.dtype))
        return result + lora_b(u) * m.to(u.dtype)  # the bias is part of what the adapter adds


class ResidualGate:
    """`W x + m * (adapted(x) - W x)` around an adapted layer of any method.

    `keep` is a forward hook of the base layer, `apply` one of the adapted layer.
    """

    def __init__(self, clone_base: bool) -> None:
        self.clone_base = clone_base
        self.kept: tuple[Tensor, Tensor] | None = None

    def __getstate__(self) -> dict:
        return {"clone_base": self.clone_base, "kept": None}

    def keep(self, base_layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        self.kept = (args[0], output)
        return output.clone() if self.clone_base else None

    def apply(self, layer: Any, args: tuple, kwargs: dict, adapted: Tensor) -> Tensor | None:
        kept, self.kept = self.kept, None
        if layer.disable_adapters:
            return None
        names = kwargs.get("adapter_names")
        m = _residual_gate(layer, args[0], names)
        if m is None:
            return None
        if layer.merged:
            raise ValueError(CANNOT_MERGE)
        x = args[0]
        if kept is not None and kept[0] is x and names is None:
            base = kept[1]
        else:  # the method fed its base layer something else, did without it, or wrote a mixed batch into it
            base = layer.base_layer(x)
            self.kept = None
        return base + m.to(base.dtype) * (adapted.to(base.dtype) - base)


def _residual_gate(layer: Any, x: Tensor, adapter_names: list[str] | None) -> Tensor | None:
    """The gate of everything that a layer's adapters add to `x`; None where no residual is gated.

    Args:
        adapter_names: one adapter per row, in a mixed batch.

    Raises:
        ValueError: a gated adapter acts beside another one, and the method does not tell apart what each adds.
    """
    if adapter_names is None:
        acting = [a for a in layer.active_adapters if a in layer._all_available_adapter_names()]
        gated = [a for a in acting if _gates_residual(layer, a)]
        if gated and len(acting) > 1:
            raise ValueError(
                f"adapters {acting} are active at once in a layer of {type(layer).__name__}, whose method does not "
                "tell apart what each of them adds; activate one, or use base='lora'"
            )
        return layer.jump_gates[gated[0]](x) if gated else None
    m = torch.ones(*x.shape[:-1], 1, device=x.device)
    for adapter in set(adapter_names):
        if _gates_residual(layer, adapter):
            rows = [i for i, name in enumerate(adapter_names) if name == adapter]
            m[rows] = layer.jump_gates[adapter](x[rows])
    return m


def _gates_residual(layer: Any, adapter: str) -> bool:
    low_rank = isinstance(getattr(layer, "lora_variant", {}).get(adapter), RoutedLora)
    return gate_of(layer, adapter) is not None and not low_rank


def _is_plain_lora(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the layer consults `lora_variant` and has none yet (DoRA, aLoRA and the like have)."""
    return (
        isinstance(layer, LoraLayer)
        and isinstance(layer.lora_A, nn.ModuleDict)  # AdaLoRA keeps bare parameters and has no variants
        and adapter in layer.lora_A
        and isinstance(layer.lora_A[adapter], nn.Linear)
        and isinstance(layer.lora_variant.get(adapter), (RoutedLora, type(None)))
    )


def _is_known(layer: BaseTunerLayer) -> bool:
    """Whether the contract suite has seen the layer's class: PEFT's and ours, not a method that a user registered."""
    return type(layer).__module__.partition(".")[0] in ("peft", "monkeyjump")


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)

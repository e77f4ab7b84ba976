"""The adapted layer of Propulsion."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.native import is_traced
from monkeyjump.ops import gated_scale, gated_scale_reference
from monkeyjump.tuner.gates import CANNOT_MERGE, AppliesGate, gate_of


class PropulsionLayer(nn.Module, BaseTunerLayer, AppliesGate):
    """`y = base(x) * (1 + m ((1 + delta)^degree - 1))`, with m the gate, 1 where there is none.

    What is stored is delta = z - 1, `[d_out]`, zero at the start: weight decay then pulls z to 1,
    where the layer does nothing, and not to 0, where it would switch the projection off (with the
    paper's decay alone z^15 would fall to 0.22). Near 1, bfloat16 moves z in steps of 1/256, and the
    power multiplies them by 15: delta stays float32.
    """

    adapter_layer_names = ("propulsion_delta",)
    other_param_names = ("degree",)

    if TYPE_CHECKING:  # nn.Module's own says Tensor | Module, also for PEFT's methods

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.propulsion_delta = nn.ParameterDict()
        self.degree: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        self.degree[adapter_name] = config.degree
        delta = torch.zeros(self.out_features)
        if not config.init_weights:
            nn.init.normal_(delta, std=0.02)
        self.propulsion_delta[adapter_name] = nn.Parameter(delta)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _gain(self, adapter: str) -> Tensor:
        """`z^degree - 1`, `[d_out]` float32."""
        return (1 + self.propulsion_delta[adapter].float()).pow(self.degree[adapter]) - 1

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            if any(gate_of(self, adapter) is not None for adapter in self.merged_adapters):
                raise ValueError(CANNOT_MERGE)
            return y
        scaled = y
        for adapter in self.active_adapters:
            if adapter in self.propulsion_delta:
                gain, gate = self._gain(adapter), gate_of(self, adapter)
                scaled = _scaled(scaled, gain, None if gate is None else gate(x))
        return scaled

    # ------------------------------------------------------------------ merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Scale the base layer's weight and bias; the routed twin refuses before it gets here."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter in self.propulsion_delta:
                self._scale_base(1 + self._gain(adapter), safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._scale_base(1 / (1 + self._gain(self.merged_adapters.pop())), safe_merge=False)

    def _scale_base(self, factor: Tensor, safe_merge: bool) -> None:
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            raise ValueError(
                f"the base layer keeps its weight as {base.weight.dtype}, which cannot be scaled; keep the adapter, or "
                "merge it into the model before it is quantized"
            )
        outputs_last = isinstance(base, Conv1D)
        weight = base.weight.data * (factor if outputs_last else factor[:, None]).to(base.weight.dtype)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError("merging would give weights that are not finite; the adapter is damaged, retrain it")
        base.weight.data = weight
        if base.bias is not None:
            base.bias.data = base.bias.data * factor.to(base.bias.dtype)

    def __repr__(self) -> str:
        return "propulsion." + super().__repr__()


def _scaled(y: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    """`y (1 + m gain)`, by the fused operation where no gradient of the gate and no tracing asks for the formula."""
    if is_traced() or (gate is not None and gate.requires_grad):
        return gated_scale_reference(y, gain, gate)
    return gated_scale(y, gain, gate)

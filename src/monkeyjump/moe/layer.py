"""A projection with its experts and its router.

    p = softmax(W_g x)   g = its top-k, renormalized, or p itself     x [B, T, d_in]   W_g [N, d_in] float32

    low rank      y = W x + s sum_n g_n B_n diag(lambda_n) A_n drop(x)    A [N r, d_in] or [r, d_in]   B [d_out, N r]
    propulsion    y = (W x + b) * (1 + sum_n g_n ((1 + delta_n)^degree - 1))      delta [N, d_out]

Routing is per token and per projection: each router reads its own projection's input. While a training
forward runs that an auxiliary loss reads, the layer notes what its router decided (auxiliary.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.moe.auxiliary import AuxiliaryLosses
from monkeyjump.moe.losses import Decision
from monkeyjump.moe.routing import route, sample_per_expert
from monkeyjump.native import is_traced
from monkeyjump.ops import (
    DropoutMask,
    mixture_delta,
    mixture_delta_reference,
    mixture_linear,
    mixture_scale,
    mixture_scale_reference,
    router_logits,
)
from monkeyjump.routing.context import ForwardContext
from monkeyjump.tuner.architectures import reads_other_tokens
from monkeyjump.tuner.fused import PLAIN, is_frozen_like, is_hooked

CANNOT_MERGE = (
    "mixtures of experts cannot be merged: which experts act differs from token to token, so no single weight matrix "
    "equals them; keep the adapter, or use unload() to take it off"
)


class ExpertLayer(nn.Module, BaseTunerLayer):
    """Base of the adapted projections: the router, and what the auxiliary losses get to see of it."""

    adapter_layer_names: tuple[str, ...] = ("mixture_router",)
    other_param_names: tuple[str, ...] = ("configs",)
    float32_names: tuple[str, ...] = ("mixture_router",)  # keep their dtype whatever the model is cast to

    frozen_peft_weight_names: dict[str, tuple[str, ...]]

    if TYPE_CHECKING:  # nn.Module's own says Tensor | Module, also for PEFT's methods

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self, base_layer: nn.Module, name: str, block: str, context: ForwardContext, auxiliary: AuxiliaryLosses
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.block, self.context, self.auxiliary = name, block, context, auxiliary
        self.mixture_router = nn.ParameterDict()
        self.configs: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(self, adapter: str, config: Any, experts: int) -> None:
        """Add an adapter with this many experts."""
        self.configs[adapter] = config
        self.mixture_router[adapter] = nn.Parameter(_kaiming(experts, self.in_features))
        self._add_experts(adapter, config, experts)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_experts(self, adapter: str, config: Any, experts: int) -> None:
        raise NotImplementedError

    # ------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.mixture_router]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)
        return self._mix(x, active, args, kwargs)

    def _mix(self, x: Tensor, active: list[str], args: tuple, kwargs: dict) -> Tensor:
        raise NotImplementedError

    def gates(self, adapter: str, x: Tensor) -> Tensor:
        """Gates `[..., N]` float32 of an adapter's experts for inputs `[..., d_in]`."""
        weight, config = self.mixture_router[adapter], self.configs[adapter]
        if is_traced():
            with torch.autocast(x.device.type, enabled=False):
                logits = x.to(weight.dtype) @ weight.T
        else:
            logits = router_logits(x, weight)
        gates, probabilities, chosen = route(logits, config.top_k)
        if self.auxiliary.wants(adapter):
            self._note(adapter, x, probabilities, chosen)
        return gates

    def _note(self, adapter: str, x: Tensor, probabilities: Tensor, chosen: Tensor) -> None:
        """Keep the decision for the auxiliary losses; nothing here may enter the graph (see auxiliary.py)."""
        if (
            self.mixture_router[adapter].requires_grad
            and not probabilities.requires_grad
            and self.context.first("grad")
        ):
            raise ValueError(
                "auxiliary losses get no gradient under reentrant gradient checkpointing; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or the losses' weights to 0"
            )
        attended = _real(self.context, self.name, x)
        flat, samples = chosen.flatten(0, -2), getattr(self.configs[adapter], "samples", 0)
        sampled = there = None
        if samples:
            sampled, there = sample_per_expert(x.flatten(0, -2), flat, attended, samples)
        outputs = functools.partial(self.expert_outputs, adapter)
        note = Decision(self.block, self.name, probabilities.flatten(0, -2), flat, attended, sampled, there, outputs)
        self.auxiliary.note(adapter, note)

    def expert_outputs(self, adapter: str, inputs: Tensor) -> Tensor:
        """What every expert makes of its own inputs, `[N, M, d_in]` to `[N, M, d_out]`, without dropout."""
        raise NotImplementedError

    # ------------------------------------------------------------------ PEFT

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refused: nothing is ever merged."""
        raise ValueError(CANNOT_MERGE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of the base layer, but never to its dtype."""
        device = self._get_base_layer_device_and_dtype(self.get_base_layer())[0] if device is None else device
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            weight = held.get(adapter_name)
            if weight is not None and device not in (None, weight.device) and not weight.is_meta:
                held[adapter_name] = nn.Parameter(weight.data.to(device), requires_grad=weight.requires_grad)

    def _apply(self, fn: Callable, recurse: bool = True) -> ExpertLayer:
        exact = [(p, p.data) for name in self.float32_names for p in getattr(self, name).values()]
        super()._apply(fn, recurse)
        for parameter, before in exact:  # model.to(bfloat16) may move them, not round them
            if parameter.dtype.itemsize < before.dtype.itemsize:
                parameter.data = before.to(parameter.device)
        return self

    def __repr__(self) -> str:
        return "mixture." + super().__repr__()


class LowRankExperts(ExpertLayer):
    """Experts of the LoRA family."""

    adapter_layer_names = (*ExpertLayer.adapter_layer_names, "mixture_A", "mixture_B", "mixture_E")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mixture_A, self.mixture_B, self.mixture_E = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

    def _add_experts(self, adapter: str, config: Any, experts: int) -> None:
        rank, rows = config.rank, config.rank * (1 if config.shares_a else experts)
        a, b = torch.empty(rows, self.in_features), torch.zeros(self.out_features, experts * rank)
        if config.peft_name == "MOE_ADALORA":
            nn.init.normal_(a, std=0.02)
            nn.init.normal_(b, std=0.02)
            self.mixture_E[adapter] = nn.Parameter(_start(config, torch.zeros(experts * rank, 1)))
        else:
            a, b = _kaiming(rows, self.in_features), _start(config, b)
        self.mixture_A[adapter] = nn.Parameter(a, requires_grad=config.trains_a)
        self.mixture_B[adapter] = nn.Parameter(b)
        if not config.trains_a:  # PEFT keeps frozen what is declared here, whenever it switches adapters on
            self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter: ("mixture_A",)}

    def _mix(self, x: Tensor, active: list[str], args: tuple, kwargs: dict) -> Tensor:
        base: Any = self.base_layer
        plain = type(base) in PLAIN and not (args or kwargs or is_traced() or is_hooked(base))
        if len(active) == 1 and plain and is_frozen_like(base.weight, base.bias, x):
            weight = base.weight.T if type(base) is Conv1D else base.weight
            return mixture_linear(x, weight, base.bias, *self._parts(active[0], x), self._dropout(active[0], x))
        y = base(x, *args, **kwargs)
        for adapter in active:
            parts, dropout = self._parts(adapter, x), self._dropout(adapter, x)
            if is_traced():
                keep = None if dropout is None else dropout.keep(x.dtype)
                y = y + mixture_delta_reference(x, *parts, keep).to(y.dtype)
            else:
                y = y + mixture_delta(x.to(y.dtype), *parts, dropout)
        return y

    def _parts(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """A with its singular values, B, the gates, and the scale."""
        a = self.mixture_A[adapter]
        if adapter in self.mixture_E:
            a = a * self.mixture_E[adapter]
        return a, self.mixture_B[adapter], self.gates(adapter, x), self.configs[adapter].scale

    def _dropout(self, adapter: str, x: Tensor) -> DropoutMask | None:
        p = self.configs[adapter].lora_dropout
        return DropoutMask.draw(x, p) if self.training and p else None

    def expert_outputs(self, adapter: str, inputs: Tensor) -> Tensor:
        b = self.per_expert(self.mixture_B[adapter].T, adapter)  # [N, r, d_out]
        a = self.mixture_A[adapter]
        a = a.unsqueeze(0) if self.configs[adapter].shares_a else self.per_expert(a, adapter)  # [N or 1, r, d_in]
        if adapter in self.mixture_E:
            a = a * self.per_expert(self.mixture_E[adapter], adapter)
        return self.configs[adapter].scale * (inputs.to(a.dtype) @ a.mT) @ b

    def per_expert(self, stacked: Tensor, adapter: str) -> Tensor:
        """`[N r, d]` as `[N, r, d]`."""
        return stacked.unflatten(0, (-1, self.configs[adapter].rank))


class ScalingExperts(ExpertLayer):
    """Experts that scale the outputs (Propulsion); stored is delta = z - 1, as in `PropulsionLayer`."""

    adapter_layer_names = (*ExpertLayer.adapter_layer_names, "mixture_delta")
    float32_names = (*ExpertLayer.float32_names, "mixture_delta")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.mixture_delta = nn.ParameterDict()

    def _add_experts(self, adapter: str, config: Any, experts: int) -> None:
        std = 1e-3 if config.init_weights else 0.02
        delta = nn.init.normal_(torch.empty(experts, self.out_features), std=std)
        self.mixture_delta[adapter] = nn.Parameter(delta)

    def _mix(self, x: Tensor, active: list[str], args: tuple, kwargs: dict) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        scale = mixture_scale_reference if is_traced() else mixture_scale
        for adapter in active:
            gain = (1 + self.mixture_delta[adapter]).pow(self.configs[adapter].degree) - 1
            y = scale(y, gain, self.gates(adapter, x))
        return y


def _kaiming(rows: int, width: int) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, width), a=math.sqrt(5))


def _start(config: Any, zeros: Tensor) -> Tensor:
    return zeros if config.init_weights else nn.init.normal_(zeros, std=0.02)


def _real(context: ForwardContext, name: str, x: Tensor) -> Tensor | None:
    """Which of the layer's tokens are real: bool `[n]`, or None where all of them are or nobody says."""
    if reads_other_tokens(name):
        return None
    if x.dim() == 3:
        attended = context.attended(x.shape[0], x.shape[1], x.device)
        return None if attended is None else attended.flatten()
    mask = context.frames[-1].mask if context.frames else None  # some layers see [B * T, d]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == x.shape[:-1].numel():
        return mask.flatten().bool()
    return None

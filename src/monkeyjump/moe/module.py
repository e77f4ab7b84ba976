"""What holds an adapter's routers: parameters that PEFT manages, the decision, and what losses see of it.

Adapted projections are such modules (layer.py), and so is what a whole feed-forward network or a whole
block is given (feed_forward.py, moa_block.py, more.py). PEFT saves, loads, activates, disables and deletes all
of them alike, because each is a `BaseTunerLayer`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.moe.auxiliary import AuxiliaryLosses
from monkeyjump.moe.losses import Decision
from monkeyjump.moe.routing import route, sample_per_expert
from monkeyjump.native import is_traced
from monkeyjump.ops import router_logits
from monkeyjump.routing.context import ForwardContext
from monkeyjump.tuner.architectures import reads_other_tokens

CANNOT_MERGE = (
    "mixtures of experts cannot be merged: which experts act differs from token to token, so no single weight matrix "
    "equals them; keep the adapter, or use unload() to take it off"
)


class ExpertModule(nn.Module, BaseTunerLayer):
    """Base of all modules that hold parameters of mixtures.

    Attributes:
        name, block: its path in the model, and that of the block around it.
        configs: by adapter, of those that have parameters here.
    """

    adapter_layer_names: tuple[str, ...] = ("mixture_router",)
    other_param_names: tuple[str, ...] = ("configs",)
    float32_names: tuple[str, ...] = ("mixture_router",)  # keep their dtype whatever the model is cast to

    frozen_peft_weight_names: dict[str, tuple[str, ...]]

    if TYPE_CHECKING:  # nn.Module's own says Tensor | Module, also for PEFT's methods

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, name: str, block: str, context: ForwardContext, auxiliary: AuxiliaryLosses) -> None:
        super().__init__()
        self.name, self.block, self.context, self.auxiliary = name, block, context, auxiliary
        self.mixture_router = nn.ParameterDict()
        self.configs: dict[str, Any] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def acting(self) -> list[str]:
        """The active adapters that have parameters here; none where adapters are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]

    def add(self, adapter: str, config: Any, **parameters: Tensor | None) -> None:
        """Give an adapter its parameters, by holder; None is left out. They train where the adapter is active."""
        self.configs[adapter] = config
        trains = adapter in self.active_adapters and not config.inference_mode
        for holder, start in parameters.items():
            if start is not None:
                getattr(self, holder)[adapter] = nn.Parameter(start, requires_grad=trains)
        self._move_adapter_to_device_of_base_layer(adapter)

    # ------------------------------------------------------------------ the decision

    def decide(self, adapter: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates `[..., N]` float32 of an adapter's experts for inputs `[..., d_in]`, and which were chosen."""
        weight, config = self.mixture_router[adapter], self.configs[adapter]
        if is_traced():
            with torch.autocast(x.device.type, enabled=False):
                logits = x.to(weight.dtype) @ weight.T
        else:
            logits = router_logits(x, weight)
        gates, probabilities, chosen = route(logits, config.top_k)
        if self.auxiliary.wants(adapter):
            self._note(adapter, x, probabilities, chosen)
        return gates, chosen

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

    def _apply(self, fn: Callable, recurse: bool = True) -> ExpertModule:
        exact = [(p, p.data) for name in self.float32_names for p in getattr(self, name).values()]
        super()._apply(fn, recurse)
        for parameter, before in exact:  # model.to(bfloat16) may move them, not round them
            if parameter.dtype.itemsize < before.dtype.itemsize:
                parameter.data = before.to(parameter.device)
        return self

    def __repr__(self) -> str:
        return "mixture." + super().__repr__()


class Companion(ExpertModule):
    """Parameters that belong to a module of the model which keeps its place and its class's name.

    Args:
        dim: width of what the module reads.
        anchor: an adapted layer of the module; parameters lie where its base layer's do.
        active: adapters that are active now.
    """

    weight = bias = None  # BaseTunerLayer would look for them in a base layer, for ever

    def __init__(
        self,
        name: str,
        block: str,
        context: ForwardContext,
        auxiliary: AuxiliaryLosses,
        dim: int,
        anchor: ExpertModule,
        active: list[str],
    ) -> None:
        super().__init__(name, block, context, auxiliary)
        self.in_features = self.out_features = dim  # PEFT reads them from every tuner layer
        self.__dict__["anchor"] = anchor  # no submodule: it has a place of its own
        self._active_adapter = active

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if device is None:
            device = self._get_base_layer_device_and_dtype(self.anchor.get_base_layer())[0]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)


def kaiming(rows: int, width: int) -> Tensor:
    """`[rows, width]`, uniform in +-1 / sqrt(width)."""
    return nn.init.kaiming_uniform_(torch.empty(rows, width), a=math.sqrt(5))


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

"""`RoutedTuner`: what every routed method adds to its PEFT tuner."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.save_and_load import _filter_state_dict_for_adapter_name
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.tuner.announce import announce
from monkeyjump.tuner.block import ROUTER, RoutedBlock, box_of, install_router, remove_router
from monkeyjump.tuner.folder import check_fingerprint, check_keys, check_whole, fingerprint
from monkeyjump.tuner.fused import fuse
from monkeyjump.tuner.gates import CANNOT_MERGE, Gate, install_gate, remove_gates
from monkeyjump.tuner.reach import call_adapters_in_evaluation, why_silent
from monkeyjump.tuner.router import Router
from monkeyjump.tuner.state import split_training_state, training_state
from monkeyjump.tuner.surroundings import context_of, hidden_size, holder_of, remove_context
from monkeyjump.tuner.targets import BlockPlan, check_targets, default_targets, plan_blocks, targeted_modules

_Tuner: Any = BaseTuner if TYPE_CHECKING else object  # always mixed into a tuner class


class RoutedTuner(_Tuner):
    """Mixin before a PEFT tuner class: routes the adapters that the tuner injects.

    The tuner does its own work unchanged; this finds the layers that it made, gives each block a
    router and each routed layer its gate.
    """

    takes_mixed_batches: bool  # whether PEFT's own tuner takes adapter_names
    model: Any
    peft_config: dict[str, PeftConfig]

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        by_default = peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None)
        if by_default:
            peft_config.target_modules = default_targets(self.model)
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        names = targeted_modules(self, prepared)
        excluded = getattr(prepared, "exclude_modules", None)  # VeRA, for one, has no such field
        silent = [name for name in names if by_default and why_silent(self.model, name, training=True)]
        if silent and not isinstance(excluded, str):
            prepared.exclude_modules = [*(excluded or ()), *silent]
            names = [name for name in names if name not in silent]
        check_targets(self.model, prepared, names)
        plan_blocks(self.model, prepared, names)  # refused, if at all, before any layer is replaced
        if names and all(isinstance(self.model.get_submodule(name), Conv1D) for name in names):
            prepared.fan_in_fan_out = True  # PEFT would set it, with a warning
        call_adapters_in_evaluation(self.model)
        return prepared

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kw: Any
    ) -> None:
        if not isinstance(target, Router):  # a state dict may name the router as if it were a target
            super()._create_and_replace(peft_config, adapter_name, target, *args, **kw)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then route what was injected."""
        given = self.peft_config[adapter_name]
        twin = next((name for name, its in self.peft_config.items() if its is given and name != adapter_name), None)
        # what is filled in here (default targets, say) must not show up in the caller's config
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, MonkeyJumpConfig)
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
            and not isinstance(layer, (Router, ParamWrapper))  # an adapter on a parameter acts on every token
            and adapter_name in layer._all_available_adapter_names()
        }
        for layer in layers.values():
            fuse(layer)
        for plan in plan_blocks(model, config, layers):
            self._route_block(model, adapter_name, config, plan, layers)
        if twin is not None:  # made from another adapter's own config: its copy, as TRL's reference for DPO
            for router in routers(model):
                router.copy_centers(twin, adapter_name)
        announce(model, [r for r in routers(model) if adapter_name in r.slots], adapter_name, config)

    def _route_block(
        self,
        model: nn.Module,
        adapter: str,
        config: MonkeyJumpConfig,
        plan: BlockPlan,
        layers: dict[str, BaseTunerLayer],
    ) -> None:
        block = model.get_submodule(plan.name)
        inside = [layers[f"{plan.name}.{slot}"] for slot in plan.routed]
        if not isinstance(block, RoutedBlock):
            holder = holder_of(model, plan.name)
            context = context_of(model, holder)
            dim = hidden_size(model, plan.name, holder, inside[0])
            install_router(block, Router(plan.name, dim, context, list(self.active_adapters)))
        router: Router = getattr(block, ROUTER)
        router.add(adapter, config, plan.routed, _device_of(inside[0]))
        for slot in (*plan.routed, *plan.shared):
            layers[f"{plan.name}.{slot}"].__dict__["jump_box"] = box_of(block, slot)
        for number, (slot, layer) in enumerate(zip(plan.routed, inside)):
            gate = Gate(box_of(block, slot), adapter, number, f"{plan.name}.{slot}")
            install_gate(layer, adapter, gate, config.base.upper())

    # ------------------------------------------------------------------ forward

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's mixed batches: row i takes adapter `adapter_names[i]`, and is routed by it."""
        names = kwargs.get("adapter_names")
        if names is not None and not self.takes_mixed_batches:
            raise ValueError(f"adapter_names={names!r}: this method takes one adapter per batch; use set_adapter")
        if names is None and kwargs.get("alora_offsets") is None:  # nothing to do, or for torch.compile to trace
            yield
            return
        with super()._enable_peft_forward_hooks(*args, **kwargs), routing_inputs(self.model, adapter_names=names):
            yield

    # ------------------------------------------------------------------ removal

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, as PEFT does for every method whose adapters are no plain sums."""
        raise ValueError(
            "routed adapters cannot be combined into one: each has a router of its own, and no weighted sum of "
            "their matrices routes as they do; keep them apart and use set_adapter"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            raise ValueError(CANNOT_MERGE)
        for module in list(self.model.modules()):
            if isinstance(module, BaseTunerLayer) and hasattr(module, "base_layer"):
                remove_gates(module)
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for module in list(model.modules()):
            if hasattr(module, ROUTER):
                remove_router(module)
        remove_context(model)
        return model

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """Adapter weights and centers; in the middle of a training also what a resumed run needs."""
        config.base_fingerprint = fingerprint(model)
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        saved.update(_router_entries(model, adapter_name, state_dict))  # some methods pick by their own prefix
        check_whole(saved)
        return {**saved, **training_state(model, adapter_name)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Checked against the model before anything of it is loaded."""
        check_fingerprint(model, config)
        weights, training = split_training_state(state_dict)
        has = model.state_dict()
        others = [name for name in model.peft_config if name != adapter_name]
        mine = _filter_state_dict_for_adapter_name(has, others)
        expected = super()._get_adapter_state_dict(model, config, adapter_name, mine, others)
        expected.update(_router_entries(model, adapter_name, has))
        check_keys({cls._remove_adapter_name_from_key(k, adapter_name): v for k, v in expected.items()}, weights, has)
        training.restore(model, adapter_name)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)
        return {**_aliases(model, remapped), **remapped}


# ---------------------------------------------------------------------- the model around the blocks


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its blocks.

    Raises:
        ValueError: the model has none.
    """
    found = [module for module in model.modules() if isinstance(module, Router)]
    if not found:
        raise ValueError("this model has no routed adapter; make one with get_peft_model(model, MonkeyJumpConfig(...))")
    return found


def _router_entries(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The centers of an adapter among the entries of a state dict."""
    holders = ("centers", "learned_centers")
    paths = [name for name, module in model.named_modules() if isinstance(module, Router)]
    keys = [f"{path}.{holder}.{adapter}" for path in paths for holder in holders]
    return {key: state_dict[key] for key in keys if key in state_dict}


def _aliases(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's other names for loaded tensors, which PEFT would report missing (UniLoRA shares one vector)."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    found = {}
    for shared in names.values():
        loaded = [weights[name] for name in shared if name in weights]
        if loaded:
            found.update(dict.fromkeys(shared, loaded[0]))
    return found


def routing_inputs(model: nn.Module, **given: Any) -> AbstractContextManager[None]:
    """Context: what every forward inside is told beside its arguments.

    For code that passes no unknown keywords on to the model.

    Args:
        model: the routed model.
        given: `task_ids` `[B]`, `prompt_lengths` `[B]`, `labels` `[B, T]`; `prompt_columns`, the width of a
            batch of prompts, where code other than `PeftModel.generate` generates without a cache.
    """
    return routers(model)[0].context.inputs(**given)


def _device_of(layer: BaseTunerLayer) -> torch.device:
    weight = next(layer.get_base_layer().parameters())
    return torch.device("cpu") if weight.is_meta else weight.device

"""`RoutedTuner`: what every routed method adds to its PEFT tuner."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.save_and_load import _filter_state_dict_for_adapter_name
from torch import Tensor, nn
from transformers import PreTrainedModel

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.routing.context import ForwardContext
from monkeyjump.tuner.block import ROUTER, RoutedBlock, install_router, remove_router
from monkeyjump.tuner.folder import check_fingerprint, check_keys, check_whole, fingerprint
from monkeyjump.tuner.fused import fuse
from monkeyjump.tuner.gates import CANNOT_MERGE, Gate, install_gate, remove_gates
from monkeyjump.tuner.router import Router
from monkeyjump.tuner.state import split_training_state, training_state
from monkeyjump.tuner.targets import BlockPlan, check_targets, default_targets, plan_blocks

logger = logging.getLogger("monkeyjump")

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
        if peft_config.target_modules is None and not getattr(peft_config, "target_parameters", None):
            peft_config.target_modules = set(default_targets(self.model))
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        check_targets(self.model, prepared)
        if not _is_all_linear(prepared.target_modules):  # before any layer is replaced
            names = [n for n, _ in self.model.named_modules() if n and self._is_target(prepared, n)]
            plan_blocks(self.model, prepared, names)
        return prepared

    def _is_target(self, config: PeftConfig, name: str) -> bool:
        return bool(self._check_target_module_exists(config, name))

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kw: Any
    ) -> None:
        if not isinstance(target, Router):  # a state dict may name the router as if it were a target
            super()._create_and_replace(peft_config, adapter_name, target, *args, **kw)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, then route what was injected."""
        # what is filled in here (default targets, say) must not show up in the caller's config
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        assert isinstance(config, MonkeyJumpConfig)
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, BaseTunerLayer)
            and not isinstance(layer, Router)
            and adapter_name in layer._all_available_adapter_names()
        }
        for layer in layers.values():
            fuse(layer)
        for plan in plan_blocks(model, config, layers):
            self._route_block(model, adapter_name, config, plan, layers)
        _report(model, adapter_name, config)

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
            holder = _holder(model, plan.name)
            context = _context_of(model, holder)
            dim = _hidden_size(model, plan.name, holder, inside[0])
            install_router(block, Router(plan.name, dim, context, list(self.active_adapters)))
        router: Router = getattr(block, ROUTER)
        router.add(adapter, config, plan.routed, _device_of(inside[0]))
        for slot in (*plan.routed, *plan.shared):
            layers[f"{plan.name}.{slot}"].__dict__["jump_box"] = router.box
        for number, layer in enumerate(inside):
            gate = Gate(router.box, adapter, number, f"{plan.name}.{plan.routed[number]}")
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
        _remove_context(model)
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
        given: `task_ids` `[B]`, `prompt_lengths` `[B]`, `labels` `[B, T]`.
    """
    return routers(model)[0].context.inputs(**given)


def _holder(model: nn.Module, block: str) -> nn.Module:
    """The innermost transformers model around a block: its mask is the one of the block's tokens."""
    holder: Any = model
    path: Any = model
    for part in block.split("."):
        path = getattr(path, part)
        if isinstance(path, PreTrainedModel):
            holder = path
    return holder


def _context_of(model: nn.Module, holder: nn.Module) -> ForwardContext:
    """The model's context, with its hooks on the outermost model and on the one that holds the blocks."""
    context = _hooked(model)
    if context is None:
        context = ForwardContext()
        context.watch(model)
    if _hooked(holder) is None:
        context.watch(holder)
    return context


def _hooked(model: nn.Module) -> ForwardContext | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ForwardContext)), None)


def _remove_context(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), ForwardContext):
                    del hooks[key]
                    for marks in (
                        module._forward_pre_hooks_with_kwargs,
                        module._forward_hooks_with_kwargs,
                        module._forward_hooks_always_called,
                    ):
                        marks.pop(key, None)


def _hidden_size(model: nn.Module, block: str, holder: nn.Module, first: BaseTunerLayer) -> int:
    """Width of the hidden states entering a block.

    Its own norm knows best (the width may differ from stage to stage), then the model's config, then
    the first adapted layer. Norms deeper inside may be as narrow as one attention head.
    """
    for child in model.get_submodule(block).children():
        if type(child).__name__.endswith("Norm") and isinstance(weight := getattr(child, "weight", None), Tensor):
            return int(weight.shape[-1])
    width = getattr(getattr(holder, "config", None), "hidden_size", None)
    return int(first.in_features if width is None else width)


def _device_of(layer: BaseTunerLayer) -> torch.device:
    weight = next(layer.get_base_layer().parameters())
    return torch.device("cpu") if weight.is_meta else weight.device


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _report(model: nn.Module, adapter: str, config: MonkeyJumpConfig) -> None:
    """Say per block what is routed, and once what is out of the ordinary."""
    mine = [r for r in routers(model) if adapter in r.slots]
    for router in mine:
        logger.info("%s: routed %s", router.name, ", ".join(router.slots[adapter]))
    if config.granularity == "task":
        return
    few = [r.name for r in mine if len(r.slots[adapter]) < config.top_k]
    if few:
        logger.warning("fewer than top_k=%d routed adapters, so all act, in: %s", config.top_k, ", ".join(few))
    uneven = {len(r.slots[adapter]) for r in mine}
    if len(uneven) > 1:
        logger.warning("the number of routed adapters differs between blocks: %s", sorted(uneven))
    decoder = config.task_type == "CAUSAL_LM" or type(model).__name__.endswith("ForCausalLM")
    if decoder and config.granularity in ("last", "mean", "max"):
        logger.warning(
            "granularity=%r sees the answer in training, which generation does not have; 'prompt_end' "
            "decides on what both have",
            config.granularity,
        )

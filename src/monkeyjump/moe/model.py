"""The mixtures as one PEFT tuner: which module gets how many experts, files, switching, what is refused."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.save_and_load import _filter_state_dict_for_adapter_name
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.moe.auxiliary import AuxiliaryLosses
from monkeyjump.moe.config import ExpertConfig, LowRankExpertConfig
from monkeyjump.moe.layer import ExpertLayer, LowRankExperts, ScalingExperts
from monkeyjump.moe.module import CANNOT_MERGE, Companion, ExpertModule
from monkeyjump.moe.ranks import ExpertRanks
from monkeyjump.tuner.folder import check_keys, check_whole
from monkeyjump.tuner.methods import NOT_ROUTABLE
from monkeyjump.tuner.rank_allocation import allocator_state, restore_allocator
from monkeyjump.tuner.reach import call_adapters_in_evaluation
from monkeyjump.tuner.registry import extend_peft_type
from monkeyjump.tuner.state import split_training_state
from monkeyjump.tuner.surroundings import context_of, holder_of, remove_context
from monkeyjump.tuner.targets import block_of, check_targets, default_targets, targeted_modules

PREFIX = "mixture_"


class MoETuner(BaseTuner):
    """Wraps every targeted linear layer in an `ExpertLayer`."""

    prefix = PREFIX
    tuner_layer_cls = ExpertModule
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    rankallocator: ExpertRanks | None = None  # where a mixture of AdaLoRA experts trains

    # ------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model)
        prepared = super()._prepare_adapter_config(peft_config, model_config)
        names = targeted_modules(self, prepared)
        check_targets(self.model, prepared, names)
        if len(prepared.expert_counts()) > 1:
            for name in names:
                layer_of(self.model, name)  # refused, if at all, before any layer is replaced
        call_adapters_in_evaluation(self.model)
        return prepared

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        scheduled = [c for c in self.peft_config.values() if _is_scheduled(c) and not c.inference_mode]
        if len(scheduled) > 1:
            raise ValueError(
                "base='adalora' supports only 1 trainable adapter, because there is one rank schedule; set "
                "inference_mode=True for the others"
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        experts = peft_config.expert_counts()[0]
        if len(peft_config.expert_counts()) > 1:
            experts = peft_config.experts_at(*layer_of(self.model, current_key))
        if isinstance(target, ExpertLayer):
            target.update_layer(adapter_name, peft_config, experts)
            return
        if isinstance(target, Companion):  # a regex may match what an earlier adapter brought
            return
        if not isinstance(target, (nn.Linear, Conv1D)):
            raise ValueError(
                f"target_modules matches {current_key!r}, a {type(target).__name__}; these experts adapt nn.Linear and "
                "Conv1D"
            )
        layer = self._wrap(current_key, target, self._kind(peft_config, current_key))
        layer.update_layer(adapter_name, peft_config, experts)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _kind(self, config: Any, name: str) -> type[ExpertLayer]:
        """The class of the adapted layer of this name."""
        return LowRankExperts if isinstance(config, LowRankExpertConfig) else ScalingExperts

    def _wrap(self, name: str, target: nn.Module, kind: type[ExpertLayer]) -> ExpertLayer:
        """An adapted layer for `target`, without any adapter yet."""
        block = block_of(self.model, name) or name
        context = context_of(self.model, holder_of(self.model, name))
        layer = kind(target, name, block, context, self.auxiliary)
        layer.set_adapter(self.active_adapters)
        return layer

    def _check_in_blocks(self, config: Any) -> dict[str, list[str]]:
        """Targets by the block that they lie in.

        Raises:
            ValueError: one lies in no block.
        """
        found: dict[str, list[str]] = defaultdict(list)
        for name in targeted_modules(self, config):
            block = block_of(self.model, name)
            if block is None:
                raise ValueError(
                    f"target_modules reaches {name}, which lies in no block, where its gates are decided; leave it "
                    "out, or say which class is a block with monkeyjump.register_block"
                )
            found[block].append(name)
        return found

    def _complete(self, adapter: str, config: Any, layers: dict[str, ExpertLayer]) -> None:
        """Add what an adapter has beside its adapted `layers` (by path): nothing here."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's; then the adapter's auxiliary losses, and AdaLoRA's rank schedule."""
        # what is filled in here (default targets, say) must not show up in the caller's config
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        auxiliary = self.auxiliary
        layers = {name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer)}
        self._complete(adapter_name, config, {name: m for name, m in layers.items() if adapter_name in m.configs})
        auxiliary.layers = list(layers.values())
        auxiliary.terms[adapter_name] = [term for term in config.terms() if term.weight]
        if _is_scheduled(config) and not config.inference_mode:
            self.rankallocator = ExpertRanks(model, config, adapter_name)

    @property
    def auxiliary(self) -> AuxiliaryLosses:
        """The model's auxiliary losses; its hooks are put there when it is first asked for."""
        owners = (getattr(hook, "__self__", None) for hook in self.model._forward_hooks.values())
        found = next((owner for owner in owners if isinstance(owner, AuxiliaryLosses)), None)
        if found is None:
            found = AuxiliaryLosses()
            found.watch(self.model)
        return found

    # ------------------------------------------------------------------ training

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the latest training forward by name, before their weights, without graph."""
        return dict(self.auxiliary.latest)

    def update_and_allocate(self, step: int) -> None:
        """AdaLoRA's rank schedule after optimizer step `step`, counted from 1, before gradients are cleared."""
        if self.rankallocator is not None:
            self.rankallocator.step(self.model, step)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"adapter_names={kwargs['adapter_names']!r}: mixtures take one adapter per batch; use set_adapter"
            )
        yield

    # ------------------------------------------------------------------ removal

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter's losses and its rank schedule go with it."""
        super().delete_adapter(adapter_name)
        self.auxiliary.terms.pop(adapter_name, None)
        if self.rankallocator is not None and self.rankallocator.adapter_name == adapter_name:
            self.rankallocator = None

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        remove_context(model)
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", 0), AuxiliaryLosses)]:
                for table in (
                    hooks,
                    model._forward_pre_hooks_with_kwargs,
                    model._forward_hooks_with_kwargs,
                    model._forward_hooks_always_called,
                ):
                    table.pop(key, None)
        return model

    # ------------------------------------------------------------------ saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """The adapter's weights; for AdaLoRA in training also the averages that its schedule carries."""
        saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        check_whole(saved)
        return {**saved, **allocator_state(model)} if _is_scheduled(config) else saved

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Checked against the model before anything of it is loaded."""
        weights, training = split_training_state(state_dict)
        has = model.state_dict()
        others = [name for name in model.peft_config if name != adapter_name]
        mine = _filter_state_dict_for_adapter_name(has, others)
        expected = super()._get_adapter_state_dict(model, config, adapter_name, mine, others)
        check_keys({cls._remove_adapter_name_from_key(k, adapter_name): v for k, v in expected.items()}, weights, has)
        restore_allocator(model, training)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, weights)


def register_method(config: type[ExpertConfig], tuner: type[MoETuner] = MoETuner) -> None:
    """Make a mixture known to PEFT under its `peft_name`.

    Args:
        config: its config class.
        tuner: its tuner class, where it needs more than experts on single projections.
    """
    extend_peft_type(config.peft_name)
    NOT_ROUTABLE[config.peft_name] = "it has a router of its own, learned, so there is nothing left to route"
    register_peft_method(name=config.peft_name.lower(), config_cls=config, model_cls=tuner, prefix=PREFIX)


def layer_of(model: nn.Module, name: str) -> tuple[int, int]:
    """Which element of how many of its list of blocks a module lies in.

    Raises:
        ValueError: it lies in no list.
    """
    module, parts = model, name.split(".")
    for part in parts:
        if isinstance(module, nn.ModuleList):
            return int(part), len(module)
        module = getattr(module, part)
    raise ValueError(
        f"num_experts differs from layer to layer, but {name} lies in no list of layers (nn.ModuleList); leave it out "
        "of target_modules, or give one number"
    )


def _is_scheduled(config: PeftConfig) -> bool:
    return getattr(config, "peft_name", None) == "MOE_ADALORA"

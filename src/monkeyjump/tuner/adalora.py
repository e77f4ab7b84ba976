"""Routed AdaLoRA: PEFT's, with these faults mended on our side.

* Its forward calls `model.forward` and so bypasses the hooks that tell blocks about masks and labels.
* Its orthogonality penalty is added whole to every micro-batch (with accumulation it counts double), and
  not at all where the PEFT model has no task type.
* It fails on labels where the adapter was loaded for inference, and adds the penalty to evaluation losses.
* On a base in half precision it makes its constant `ranknum` trainable.
* It cannot reload its own file once ranks were pruned: ours keeps full ranks, pruned ones as zeros.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from monkeyjump.routing.pooling import IGNORED_LABEL
from monkeyjump.tuner.model import RoutedTuner, routers
from monkeyjump.tuner.rank_allocation import allocator_state, restore_allocator
from monkeyjump.tuner.state import split_training_state

logger = logging.getLogger("monkeyjump")


class RoutedAdaLora(RoutedTuner):
    """Mixin before `AdaLoraModel`."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which would warn of the rank pattern that its own allocator wrote."""
        config = self.peft_config[adapter_name]
        with _full_ranks(config):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        _freeze_ranknum(model, adapter_name)
        if not config.inference_mode:
            model.register_forward_hook(OrthogonalityPenalty(adapter_name, config.orth_reg_weight), with_kwargs=True)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        _freeze_ranknum(self.model, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, by a call and not by `model.forward`."""
        return self.model(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter's penalty goes with it."""
        super().delete_adapter(adapter_name)
        _remove_penalties(self.model, adapter_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        _remove_penalties(model, None)
        return model

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        with _full_ranks(config):
            saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        running = any(router.schedule is not None for router in routers(model))  # a finished run leaves nothing behind
        return {**saved, **allocator_state(model, config.rank_pattern if running else None)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state = split_training_state(state_dict)[1]
        config.rank_pattern = restore_allocator(model, state) or config.rank_pattern
        with _full_ranks(config):
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


class OrthogonalityPenalty:
    """Forward hook of the base model: adds the penalty to the loss while training.

    On the model and not in the tuner's forward, which PEFT's wrapper without a task type bypasses.
    """

    def __init__(self, adapter: str, weight: float) -> None:
        self.adapter, self.weight = adapter, weight

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        loss = getattr(outputs, "loss", None)
        if model.training and isinstance(loss, Tensor) and self._acts(model):
            share = self.weight * share_of_step(model, kwargs)
            outputs.loss = loss + share * orthogonality_penalty(model, self.adapter)

    def _acts(self, model: nn.Module) -> bool:
        """Whether the adapter is on; says once if it trains without its rank schedule."""
        layer = next(m for m in model.modules() if isinstance(m, AdaLoraLayer))
        if layer.disable_adapters or self.adapter not in layer.active_adapters:
            return False
        router = routers(model)[0]
        if router.schedule is None and router.context.first_time("ranks"):
            logger.warning("AdaLoRA trains without its rank schedule; pass a CenterUpdate to Trainer, or attach one")
        return True


def _freeze_ranknum(model: nn.Module, adapter: str) -> None:
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer) and adapter in layer.ranknum:
            layer.ranknum[adapter].requires_grad_(False)


def _remove_penalties(model: nn.Module, adapter: str | None) -> None:
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, OrthogonalityPenalty) and adapter in (None, hook.adapter):
            del model._forward_hooks[key], model._forward_hooks_with_kwargs[key]


def orthogonality_penalty(model: nn.Module, adapter: str) -> Tensor:
    """Mean over all P `[d_out, r]` and Q `[r, d_in]` of ||P^T P - I||_F and ||Q Q^T - I||_F (AdaLoRA, Eq. 4)."""
    terms = []
    for name, matrix in model.named_parameters():
        if name.endswith(f"lora_A.{adapter}"):
            gram = matrix @ matrix.T
        elif name.endswith(f"lora_B.{adapter}"):
            gram = matrix.T @ matrix
        else:
            continue
        terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return torch.stack(terms).mean()


def share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's share of the optimizer step, by supervised tokens, where Trainer says how many there are."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    shifted = getattr(model, "loss_type", None) == "ForCausalLM"
    labels = labels[..., 1:] if shifted else labels
    return (labels != IGNORED_LABEL).sum() / total


@contextmanager
def _full_ranks(config: Any) -> Iterator[None]:
    """Hide `rank_pattern`, by which PEFT resizes when saving and loading; here a pruned rank is a zero in lora_E."""
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern

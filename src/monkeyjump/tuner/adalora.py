"""Routed AdaLoRA: PEFT's, with four of its faults mended on our side.

* Its forward calls `model.forward` and so bypasses the hooks that tell blocks about masks and labels.
* Its orthogonality penalty is added whole to every micro-batch: with accumulation it counts double.
* It fails on labels where the adapter was loaded for inference, and adds the penalty to evaluation losses.
* It cannot reload its own file once ranks were pruned: ours keeps full ranks, pruned ones as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from monkeyjump.routing.pooling import IGNORED_LABEL
from monkeyjump.tuner.model import RoutedTuner
from monkeyjump.tuner.state import TrainingState, key_of, split_training_state

ALLOCATOR = "rank_allocator"
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # what RankAllocator carries from step to step


class RoutedAdaLora(RoutedTuner):
    """Mixin before `AdaLoraModel`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output; in training its loss carries the orthogonality penalty."""
        outputs = self.model(*args, **kwargs)
        adapter = self.__dict__.get("trainable_adapter_name")
        loss = getattr(outputs, "loss", None)
        if self.training and adapter is not None and isinstance(loss, Tensor):  # type: ignore[attr-defined]
            weight = self.peft_config[adapter].orth_reg_weight * _share_of_step(self.model, kwargs)
            outputs.loss = loss + weight * orthogonality_penalty(self.model, adapter)
        return outputs

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        with _full_ranks(config):
            saved = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {**saved, **_allocator_state(model)}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        _restore_allocator(model, split_training_state(state_dict)[1])
        with _full_ranks(config):
            return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


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


def _share_of_step(model: nn.Module, kwargs: dict[str, Any]) -> Tensor | float:
    """This micro-batch's share of the optimizer step, by supervised tokens, where Trainer says how many there are."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return 1.0
    shifted = getattr(model, "loss_type", None) == "ForCausalLM"
    labels = labels[..., 1:] if shifted else labels
    return (labels != IGNORED_LABEL).sum() / total


@contextmanager
def _full_ranks(config: Any) -> Iterator[None]:
    """PEFT resizes by `rank_pattern` both when saving and when loading; a pruned rank is a zero in lora_E."""
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def _allocator(model: nn.Module) -> Any:
    tuner = model.base_model if isinstance(model, PeftModel) else model
    return getattr(tuner, "rankallocator", None)


def _allocator_state(model: nn.Module) -> dict[str, Tensor]:
    allocator, state = _allocator(model), {}
    if allocator is not None:
        for average in AVERAGES:
            for name, value in getattr(allocator, average).items():
                state[key_of(ALLOCATOR, f"{average}.{name}")] = value
    return state


def _restore_allocator(model: nn.Module, state: TrainingState) -> None:
    saved, allocator = state.tensors.get(ALLOCATOR), _allocator(model)
    if not saved or allocator is None:
        return
    for key, value in saved.items():
        average, _, name = key.partition("/")
        name = name.replace("/", ".")
        getattr(allocator, average)[name] = value
        allocator.ipt.setdefault(name, torch.zeros_like(value))

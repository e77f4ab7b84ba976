"""AdaLoRA's rank allocation, which is PEFT's: whether it can run, and what it carries from step to step.

PEFT keeps the averages that ranks are scored by in no file, so that a run that goes on would prune others. Here they
are tensors, for an adapter's own file (routed AdaLoRA, mixtures) or one beside it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from monkeyjump.tuner.state import TrainingState, key_of

logger = logging.getLogger("monkeyjump")

ALLOCATOR = "rank_allocator"
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # what RankAllocator carries
PATTERN = "rank_pattern"  # and what the config carries: the ranks that stay, once the schedule is over


def allocating_tuner(model: nn.Module, total_steps: int | None) -> AdaLoraModel | None:
    """The AdaLoRA in `model`, if there is one, whose `update_and_allocate` is to be called before every step.

    Args:
        total_steps: optimizer steps of the run, where that is known.

    Raises:
        ValueError: the model is sharded, or the schedule is one for another number of steps.
    """
    tuner = next((m for m in model.modules() if isinstance(m, AdaLoraModel)), None)
    if tuner is None:
        if any(isinstance(m, AdaLoraLayer) for m in model.modules()):
            logger.warning("AdaLoRA's rank schedule needs the model that get_peft_model returns; no rank will move")
        return None
    check_schedule(tuner, tuner.peft_config[tuner.trainable_adapter_name].total_step, total_steps)
    return tuner


def check_schedule(tuner: nn.Module, planned: int, total_steps: int | None) -> None:
    """Whether ranks can be allocated in a run.

    Args:
        planned: optimizer steps that the schedule was made for.
        total_steps: those of the run, where that is known.

    Raises:
        ValueError: the tuner is sharded, or the two numbers differ.
    """
    if any(isinstance(parameter, DTensor) for parameter in tuner.parameters()):
        raise ValueError(
            "base='adalora' cannot be sharded by FSDP2: PEFT's rank allocation reads whole matrices and gradients; "
            "train it under DDP, or take base='lora'"
        )
    if total_steps is not None and planned != total_steps:
        raise ValueError(
            f"total_step={planned} is what AdaLoRA's rank schedule runs over, but this run has {total_steps} optimizer "
            f"steps; set total_step={total_steps}"
        )


def allocator_tensors(allocator: Any, pattern: dict[str, list[bool]] | None) -> dict[str, Tensor]:
    """What PEFT's allocator carries from step to step, by `kind/parameter`.

    Args:
        pattern: the ranks that stay, which the allocator writes into the config once its schedule is over.
    """
    averages = {f"{kind}/{name}": value for kind in AVERAGES for name, value in getattr(allocator, kind).items()}
    return averages | {f"{PATTERN}/{name}": torch.tensor(kept) for name, kept in (pattern or {}).items()}


def load_allocator(tuner: Any, tensors: dict[str, Tensor]) -> dict[str, list[bool]]:
    """The inverse of `allocator_tensors`: gives the averages to the tuner's allocator and returns the pattern.

    Args:
        tensors: names of parameters with dots or, as in an adapter's file, with slashes.
    """
    pattern: dict[str, list[bool]] = {}
    parameters = dict(tuner.model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        name = name.replace("/", ".")
        if kind == PATTERN:
            pattern[name] = value.tolist()
        else:
            # those of a mixture go by names that are no parameter's
            average = value.to(parameters[name].device) if name in parameters else value
            getattr(tuner.rankallocator, kind)[name] = average
            tuner.rankallocator.ipt.setdefault(name, torch.zeros_like(average))  # else PEFT starts anew
    return pattern


def allocator_state(model: nn.Module, pattern: dict[str, list[bool]] | None = None) -> dict[str, Tensor]:
    """`allocator_tensors` under the keys of a training state; nothing where no ranks are allocated."""
    allocator = getattr(_tuner(model), "rankallocator", None)
    tensors = {} if allocator is None else allocator_tensors(allocator, pattern)
    return {key_of(ALLOCATOR, key): value for key, value in tensors.items()}


def restore_allocator(model: nn.Module, state: TrainingState) -> dict[str, list[bool]]:
    """Put the averages back; returns the ranks that stay, where `allocator_state` was given them."""
    tuner, saved = _tuner(model), state.tensors.get(ALLOCATOR, {})
    return load_allocator(tuner, saved) if getattr(tuner, "rankallocator", None) is not None else {}


def _tuner(model: nn.Module) -> Any:
    return model.base_model if isinstance(model, PeftModel) else model

"""AdaLoRA's rank schedule for the plain method, which Trainer alone never runs; `CenterUpdate` runs the routed one's.

PEFT cuts the file to the ranks that are left, and keeps its allocator's averages nowhere: a run that goes on from
that has other shapes and other importances. Here the file keeps all ranks, pruned ones as zeros, and a checkpoint
holds the averages and the last pattern beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

ALLOCATOR = "rank_allocator.safetensors"
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"


class RankSchedule(TrainerCallback):
    """Prunes ranks before each optimizer step, while the gradients are there.

    Args:
        resume: checkpoint to take the schedule up from; None: from the start.
    """

    def __init__(self, tuner: AdaLoraModel, resume: Path | None = None) -> None:
        self.tuner = tuner
        self.pattern: dict[str, list[bool]] | None = None
        self.resume = resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resume is not None and (self.resume / ALLOCATOR).is_file():
            self._restore(load_file(self.resume / ALLOCATOR))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        config.rank_pattern = self.pattern
        self.tuner.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern, None  # by which PEFT would cut the file

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        allocator = self.tuner.rankallocator
        tensors = {f"{kind}/{name}": value for kind in AVERAGES for name, value in getattr(allocator, kind).items()}
        patterns = {f"{PATTERN}/{name}": torch.tensor(kept) for name, kept in (self.pattern or {}).items()}
        save_file({name: value.contiguous() for name, value in (tensors | patterns).items()}, folder / ALLOCATOR)

    def _restore(self, saved: dict[str, torch.Tensor]) -> None:
        allocator = self.tuner.rankallocator
        pattern: dict[str, list[bool]] = {}
        for key, value in saved.items():
            kind, _, name = key.partition("/")
            if kind == PATTERN:
                pattern[name] = value.tolist()
            else:
                device = self.tuner.model.get_parameter(name).device
                getattr(allocator, kind)[name] = value.to(device)
                allocator.ipt.setdefault(name, torch.zeros_like(value, device=device))  # else PEFT starts anew
        self.pattern = pattern or None

"""AdaLoRA's rank schedule for the plain method, which Trainer alone never runs; `CenterUpdate` runs the routed one's.

PEFT cuts the file to the ranks that are left, and keeps its allocator's averages nowhere: a run that goes on from
that has other shapes and other importances. Here the file keeps all ranks, pruned ones as zeros, and a checkpoint
holds the averages and the last pattern beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from monkeyjump.tuner.rank_allocation import allocator_tensors, load_allocator

ALLOCATOR = "rank_allocator.safetensors"


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
            self.pattern = load_allocator(self.tuner, load_file(self.resume / ALLOCATOR)) or None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.tuner.peft_config[self.tuner.trainable_adapter_name]
        config.rank_pattern = self.pattern
        self.tuner.update_and_allocate(state.global_step + 1)
        self.pattern, config.rank_pattern = config.rank_pattern, None  # by which PEFT would cut the file

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        tensors = allocator_tensors(self.tuner.rankallocator, self.pattern)
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / ALLOCATOR)

"""`OrderUpdate`: measure and fold the order anew in the middle of training, from inside a stock Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from monkeyjump.mamba.evaluating import Batch
from monkeyjump.mamba.order.order import NAMES, ChannelOrder


class OrderUpdate(TrainerCallback):
    """Update `order` on `batches` every `every` optimizer steps, the optimizer's moments along.

    Each checkpoint gets the order beside the weights it was folded into; a resumed run reads it back with `resume`.
    Ranks of DDP must be given the same batches: each folds its own replica.
    """

    def __init__(self, order: ChannelOrder, batches: Iterable[Batch], every: int = 1000) -> None:
        if every < 1:
            raise ValueError(f"scan_update_frequency={every!r} must be at least 1 step")
        self.order, self.batches, self.every = order, list(batches), every

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0:
            self.order.update(model, self.batches, optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.order.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def resume(self, checkpoint: str | Path) -> None:
        """Go on from the order that `checkpoint` was saved with."""
        if (Path(checkpoint) / NAMES).exists():
            self.order = ChannelOrder.load(checkpoint)

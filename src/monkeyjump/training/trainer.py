"""The stock Trainer, with two things looked at on the way: the loss of each task, and which rows a batch held."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor
from transformers import Trainer

from monkeyjump.evaluation.questions import needs_task_ids
from monkeyjump.training.losses import TaskLosses


class RunTrainer(Trainer):
    """Trainer for batches of `RunCollator`.

    Attributes:
        task_losses: since the last log; they go into it.
        recent: (row numbers, loss) of the micro-batches of the step at hand.
    """

    def __init__(self, *args: Any, names: list[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task_losses = TaskLosses(names)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=self.args.gradient_accumulation_steps)
        self._task_ids_wanted = needs_task_ids(self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As Trainer's; row and task numbers stay with us, but for a model that routes by task."""
        row_ids, task_ids = inputs.pop("row_ids"), inputs["task_ids"]
        if not self._task_ids_wanted:
            del inputs["task_ids"]
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.recent.append((row_ids, loss.detach()))
        self.task_losses.add(outputs.logits, labels, task_ids)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the loss of each task beside the loss."""
        super().log({**logs, **self.task_losses.take()} if "loss" in logs else logs, start_time)

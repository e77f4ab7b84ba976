"""The stock Trainer for windows of text, and the held-out perplexity on the way."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from monkeyjump.mamba.perplexity import perplexity
from monkeyjump.mamba.presets import Training
from monkeyjump.training.arguments import OURS


class WindowTrainer(Trainer):
    """Trainer for batches of `windows.collate`.

    Attributes:
        recent: (window numbers, loss) of the step at hand.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("row_ids")
        found = super().compute_loss(model, inputs, *args, **kwargs)
        self.recent.append((rows, (found[0] if isinstance(found, tuple) else found).detach()))
        return found

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The matrices but A_log: it sets the time scales of the states, and decay would pull them to one."""
        return [name for name, tensor in model.named_parameters() if tensor.ndim > 1 and not name.endswith(".A_log")]


class HeldOut(TrainerCallback):
    """Logs the perplexity on `texts` every so many steps, and at the end."""

    def __init__(self, tokenizer: Any, texts: list[str], settings: Training) -> None:
        self.tokenizer, self.texts, self.settings = tokenizer, texts, settings
        self.trainer: WindowTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.settings.evaluate_every and state.global_step != state.max_steps:
            return
        length = self.settings.context_length
        found = perplexity(model, self.tokenizer, self.texts, length, length, self.settings.batch_size)
        assert self.trainer is not None
        due = control.should_log
        self.trainer.log({"held_out/perplexity": found.per_token, "held_out/perplexity_per_byte": found.per_byte})
        control.should_log = due  # Trainer takes the loss's own line for written


def training_arguments(settings: Training, steps: int, folder: Path) -> TrainingArguments:
    """`folder` is where Trainer writes; the run moves what is complete away from there."""
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size,
        "max_steps": steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.scheduler,
        "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay,
        "adam_beta2": settings.beta2,
        "seed": settings.seed,
        "logging_steps": settings.log_every,
        "save_steps": settings.save_every,
        "train_sampling_strategy": "sequential",  # Windows has the order
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**given, **OURS, "include_num_input_tokens_seen": "all"})

"""The `train` section as transformers' TrainingArguments."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from monkeyjump.suggest import did_you_mean
from monkeyjump.tasks.errors import InputError

if TYPE_CHECKING:
    from monkeyjump.training.config import Train

KNOWN = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
# transformers 5.23 has renamed it
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"

# argument of transformers -> the field of ours that says it
NAMED = {
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
    "optim": "optimizer",
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "report_to": "report_to",
    "output_dir": "output.folder",
}
# what the run itself depends on
OURS: dict[str, Any] = {
    "save_strategy": "steps",
    "logging_strategy": "steps",
    "logging_nan_inf_filter": False,  # a loss that is not finite must show
    "include_num_input_tokens_seen": "non_padding",
    "remove_unused_columns": False,  # the collator decides what the model gets
    "disable_tqdm": True,  # progress is shown by us
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "save_only_model": False,
}


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises ValueError for an argument that transformers does not know, or that is said elsewhere."""
    wrong = [f"'{name}': set {NAMED[name]} instead" for name in arguments if name in NAMED]
    wrong += [f"'{name}' is set by the run itself" for name in arguments if name in OURS]
    unknown = [name for name in arguments if name not in KNOWN]
    wrong += [f"'{name}' is no argument of TrainingArguments: {did_you_mean(name, KNOWN)}".rstrip() for name in unknown]
    if wrong:
        raise ValueError("; ".join(wrong))


def check_machine(train: Train) -> None:
    """Raises InputError for what this machine cannot do, which Trainer would say after the long k-means."""
    if train.precision == "fp16" and not torch.accelerator.is_available():
        raise InputError("train.precision = 'fp16': it needs a GPU, and none is here", hint="use bf16 or none")
    try:
        training_arguments(train, Path("unused"))
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"train: {' '.join(str(error).split())}", hint="correct train.arguments") from error


def total_steps(train: Train, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run over `rows` rows an epoch, as Trainer counts them."""
    micro = math.ceil(math.ceil(rows / processes) / train.batch_size)
    return train.max_steps or math.ceil(train.epochs * max(1, math.ceil(micro / train.accumulation)))


def training_arguments(train: Train, folder: Path, **changes: Any) -> TrainingArguments:
    """`folder` is where Trainer writes; the run moves what is complete away from there."""
    given = {
        "output_dir": str(folder),
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.scheduler,
        "warmup_steps": train.warmup,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optimizer,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        CHECKPOINTING: train.gradient_checkpointing,
        "seed": train.seed,
        "logging_steps": train.log_every,
        "save_steps": train.save_every,
        "report_to": train.report_to or "none",
        "dataloader_pin_memory": False,
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused, and ranks would train alone
    }
    return TrainingArguments(**{**given, **OURS, **train.arguments, **changes})

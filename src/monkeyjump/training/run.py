"""One training run: rows of tokens -> the stock transformers Trainer -> a trained adapter."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from monkeyjump.tasks.errors import InputError
from monkeyjump.tasks.prompts import Collator

MOST_MASKED = 0.05  # share of rows without a supervised token above which the data must be wrong


class TrainSettings(BaseModel):
    """What a run does; two runs to be compared get the same settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(default=8, ge=1, description="rows a step")
    epochs: int = Field(default=1, ge=1, description="passes over the rows")
    learning_rate: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=2, ge=0, description="steps over which the learning rate rises")
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0, description="order of the rows and dropout")

    def steps(self, rows: int) -> int:
        return self.epochs * -(-rows // self.batch_size)


@dataclass(frozen=True)
class Step:
    """What is known after one optimizer step."""

    number: int
    total: int
    loss: float
    tokens_per_second: float
    seconds: float


@dataclass
class TrainResult:
    steps: int
    seconds: float
    tokens: int
    losses: list[float] = field(default_factory=list)
    masked_rows: int = 0


class _Report(TrainerCallback):
    """Collects losses and passes each step on. `tokens` counts attended tokens only."""

    def __init__(self, result: TrainResult, report: Callable[[Step], None]) -> None:
        self.result, self.report, self.start = result, report, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step} of {state.max_steps}: training cannot "
                f"recover from that; lower learning_rate (now {args.learning_rate:g})"
            )
        seconds = time.perf_counter() - self.start
        self.result.losses.append(logs["loss"])
        self.result.steps, self.result.seconds = state.global_step, seconds
        self.result.tokens = int(state.num_input_tokens_seen)
        rate = self.result.tokens / seconds
        self.report(Step(state.global_step, state.max_steps, logs["loss"], rate, seconds))


def supervised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with at least one supervised token. Raises InputError if too many have none.

    Such a row adds nothing or, alone in a batch, a loss of 0/0.
    """
    kept = [row for row in rows if any(label >= 0 for label in row["labels"])]
    masked = len(rows) - len(kept)
    if not kept or masked > MOST_MASKED * len(rows):
        first = next((n for n, row in enumerate(rows) if all(label < 0 for label in row["labels"])), 0)
        raise InputError(
            f"labels: {masked} of {len(rows)} training rows have no supervised token (first: row {first})",
            hint="the answer is missing or was cut away: check choices and max_text_tokens of the tasks",
        )
    return kept


def train(
    model: Any,
    rows: Sequence[dict[str, Any]],
    collator: Collator,
    settings: TrainSettings,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[Step], None] = lambda step: None,
) -> TrainResult:
    """Trains `model` in place on rows of input_ids, attention_mask, labels. Nothing is written to disk.

    Raises FloatingPointError at the first loss that is not finite.
    """
    kept = supervised(rows)
    result = TrainResult(0, 0.0, 0, masked_rows=len(rows) - len(kept))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup_steps,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            logging_nan_inf_filter=False,  # a loss that is not finite must show
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,  # the collator decides what the model gets
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=list(kept), data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        for callback in (*callbacks, _Report(result, report)):
            trainer.add_callback(callback)
        trainer.train()
    return result

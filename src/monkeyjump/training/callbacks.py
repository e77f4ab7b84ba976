"""What watches a run from inside Trainer: finite gradients, complete checkpoints, signals, metrics."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import TrainerCallback

from monkeyjump.training.checkpoints import finish
from monkeyjump.training.probe import adapted
from monkeyjump.training.signals import Interrupts
from monkeyjump.tuner.callback import CenterUpdate

NAMED_ROWS = 8  # of a bad batch


@dataclass(frozen=True)
class Step:
    """What is known where metrics are logged. `loss` is the mean since the last time."""

    number: int
    total: int
    loss: float
    tokens: int
    tokens_per_second: float
    seconds: float
    metrics: dict[str, float]


class KeepsRecent(Protocol):
    """A Trainer that knows (row numbers, loss) of the micro-batches of the step at hand."""

    recent: deque[tuple[Tensor, Tensor]]


class FiniteGradients(TrainerCallback):
    """Takes the gradients out of a step where they are not finite, and ends the run after several such steps.

    Ranks agree: they look at gradients that are already summed. Under fp16 the scaler does this itself.
    """

    def __init__(self, most: int, centers: CenterUpdate | None, where: Callable[[int], str]) -> None:
        self.most, self.centers, self.where = most, centers, where
        self.bad = 0
        self.trainer: KeepsRecent | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.fp16:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients or torch.nn.utils.get_total_norm(gradients).isfinite():
            self.bad = 0
            return
        self.bad += 1
        for gradient in gradients:
            gradient.zero_()
        if self.centers is not None:
            self.centers.skip()
        if self.bad >= self.most:
            raise FloatingPointError(self._message(args, state))

    def _message(self, args: Any, state: Any) -> str:
        assert self.trainer is not None
        batch = [(ids.tolist(), loss.item()) for ids, loss in self.trainer.recent]
        broken = [rows for rows, loss in batch if not math.isfinite(loss)] or [rows for rows, _ in batch]
        rows = [row for ids in broken for row in ids]
        named = "; ".join(self.where(row) for row in rows[:NAMED_ROWS])
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        return (
            f"no finite gradient in {self.bad} steps in a row, up to step {state.global_step + 1} of "
            f"{state.max_steps}; its batch was {named}{more}: correct these rows, or lower train.learning_rate "
            f"(now {args.learning_rate:g})"
        )


class EveryAdapterLearns(TrainerCallback):
    """Ends the run at its first step where an adapter is not in the graph at all, which no loss shows (F01, F25)."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step:
            return
        out = [name for name, tensors in adapted(model).items() if all(tensor.grad is None for tensor in tensors)]
        if out:
            raise RuntimeError(
                f"no gradient can reach {len(out)} adapters ({', '.join(out[:5])}): the model reads around them; take "
                "them out of method.target_modules"
            )


class RankSchedule(TrainerCallback):
    """AdaLoRA's, for the plain method: Trainer alone never calls it. `CenterUpdate` does it for the routed one."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


class Checkpoints(TrainerCallback):
    """Completes what Trainer wrote. Weights that are not finite never become a checkpoint."""

    def __init__(self, folder: Path, keep: int, extra: Callable[[Path], None] = lambda folder: None) -> None:
        self.folder, self.keep, self.extra = folder, keep, extra
        self.last: Path | None = None

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        barrier()
        if state.is_world_process_zero:
            wrong = next((n for n, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()), None)
            if wrong is not None:
                raise FloatingPointError(f"step {state.global_step}: {wrong} holds values that are not finite")
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.extra(written)
            self.last = finish(written, self.folder, self.keep)
        barrier()


class StopOnSignal(TrainerCallback):
    """Saves and ends the run at the end of the step in which a signal came, to whichever rank."""

    def __init__(self, interrupts: Interrupts) -> None:
        self.interrupts = interrupts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupts.gentle = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupts.received = highest(self.interrupts.received, args.device)
        if self.interrupts.received:
            control.should_save = control.should_log = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.interrupts.gentle = False


class Metrics(TrainerCallback):
    """Passes on each line of metrics."""

    def __init__(self, report: Callable[[Step], None]) -> None:
        self.report, self.start, self.tokens_before = report, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.tokens_before = time.perf_counter(), int(state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not state.is_world_process_zero or "train_loss" in logs:  # the summary at the end
            return
        seconds = time.perf_counter() - self.start
        tokens = int(state.num_input_tokens_seen)
        rate = (tokens - self.tokens_before) / seconds
        loss = logs.get("loss", math.nan)
        self.report(Step(state.global_step, state.max_steps, loss, tokens, rate, seconds, dict(logs)))


def barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def highest(value: int, device: torch.device) -> int:
    """Over all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)

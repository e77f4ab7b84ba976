"""`RankUpdate`: drives the rank schedule of `MoEConfig(base="adalora")`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from monkeyjump.moe.model import MoETuner
from monkeyjump.tuner.rank_allocation import check_schedule


class RankUpdate(TrainerCallback):
    """Score and prune the experts' ranks after every optimizer step.

    Under Trainer: `Trainer(..., callbacks=[RankUpdate()])`. In a plain loop: `RankUpdate().attach(model,
    optimizer)`, nothing else. A step that was skipped (fp16 overflow) does not count.
    """

    def __init__(self) -> None:
        self.completed = 0
        self._tuner: MoETuner | None = None

    def attach(self, model: nn.Module, optimizer: Any, completed: int = 0) -> RankUpdate:
        """Act after every step of `optimizer` (accelerate's wrapper is looked through).

        Args:
            completed: steps that a resumed run has behind it.

        Raises:
            ValueError: the model has no such adapter that trains, or it is sharded.
        """
        self._tuner, self.completed = _tuner_of(model, None), completed
        getattr(optimizer, "optimizer", optimizer).register_step_post_hook(self._after_step)
        return self

    def _after_step(self, optimizer: Any, args: tuple, kwargs: dict) -> None:
        assert self._tuner is not None
        self.completed += 1
        self._tuner.update_and_allocate(self.completed)

    # ------------------------------------------------------------------ Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._tuner = _tuner_of(model, state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        assert self._tuner is not None
        if not getattr(optimizer, "step_was_skipped", False):
            self._tuner.update_and_allocate(state.global_step + 1)


def _tuner_of(model: nn.Module, total_steps: int | None) -> MoETuner:
    tuner = next((m for m in model.modules() if isinstance(m, MoETuner)), None)
    if tuner is None or tuner.rankallocator is None:
        raise ValueError("this model has no mixture of AdaLoRA experts that trains, so RankUpdate has nothing to do")
    check_schedule(tuner, tuner.rankallocator.peft_config.total_step, total_steps)
    return tuner

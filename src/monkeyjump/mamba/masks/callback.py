"""`MaskUpdate`: learned masks inside a stock Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from monkeyjump.mamba.masks.learned import LearnedMasks


class MaskUpdate(TrainerCallback):
    """Sets the masks of every step, and adds the regularizer: to the gates' gradients, once per optimizer step.

    The regularizer depends on the gates alone, so its gradient is added to that of the loss just before the step. That
    is the gradient of their sum, whatever the number of micro-batches, ranks, and the way Trainer scales the loss. It
    is not clipped. Trainer's logged loss is the cross-entropy, the regularizer stands beside it.
    """

    def __init__(self, masks: LearnedMasks) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm={args.max_grad_norm!r} with fp16 leaves gradients scaled where the masks' regularizer "
                f"is added: set max_grad_norm, or use bf16"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.masks.advance(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logits = [gate.logits for gate in self.masks.gates.values() if gate.logits.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.masks.penalty(), logits)
        for parameter, gradient in zip(logits, gradients):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        with torch.no_grad():
            found = {
                "regularizer": self.masks.penalty().item(),
                "sparsity": self.masks.expected_sparsity().item(),
                "target_sparsity": self.masks.target,
                "masking_tau": self.masks.temperature,
            }
        logs |= found
        state.log_history[-1] |= found  # Trainer has written it before it asks

"""Memory and disk that a run will need: from shapes alone, or with what a batch was seen to keep.

weights       every parameter in its dtype
adapters      float32 weight, gradient and AdamW's two averages: 16 bytes a trainable parameter
activations   what the forward pass keeps for the backward pass: measured where the weights are there, else
              about 12 hidden and 4 feed-forward widths per token and block, and the logits in float32 twice
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from monkeyjump.training.config import Train

ADAM_BYTES = 16


@dataclass(frozen=True)
class Estimate:
    """Bytes."""

    weights: int
    adapters: int
    activations: int
    measured: bool
    checkpoint: int
    disk: int

    @property
    def memory(self) -> int:
        return self.weights + self.adapters + self.activations


def estimate(model: nn.Module, config: Any, train: Train, tokens: int, kept: int | None = None) -> Estimate:
    """For a batch of `tokens` tokens, padding included.

    Args:
        config: transformers' config of the base model.
        kept: bytes that a batch was measured to keep; None: from the shapes.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    checkpoint = 3 * 4 * trainable  # weights and the optimizer's two averages
    activations = _activations(config.get_text_config(), weights, train, tokens) if kept is None else kept
    return Estimate(
        weights=weights,
        adapters=ADAM_BYTES * trainable,
        activations=activations,
        measured=kept is not None,
        checkpoint=checkpoint,
        disk=checkpoint * (train.keep + 1) + 4 * trainable,
    )


def _activations(text: Any, weights: int, train: Train, tokens: int) -> int:
    hidden, blocks = text.hidden_size, text.num_hidden_layers
    item = 2 if train.precision != "none" or str(text.dtype) in ("torch.bfloat16", "torch.float16") else 4
    wide = getattr(text, "intermediate_size", None) or 4 * hidden  # GPT-2 names none
    block = tokens * (12 * hidden + 4 * wide) * item
    kept = blocks * tokens * hidden * item + block if train.gradient_checkpointing else blocks * block
    return kept + 2 * 4 * tokens * text.vocab_size

"""A few training batches before the long run: does a gradient reach every adapter, and what does a batch keep?

With A random and B zero, A has no gradient on the first step; an adapter counts as reached where any of its
trainable tensors has one. A routed adapter that no token of a batch was sent to has none either, so further
batches are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.evaluation.questions import needs_task_ids
from monkeyjump.tuner.router import Router

OWN_COLUMNS = ("task_ids", "row_ids")  # of the batch, not of the model


@dataclass(frozen=True)
class Probe:
    """`unreached`: adapted modules without a gradient after `batches`; `losses`: one each."""

    batches: int
    losses: list[float]
    adapters: int
    unreached: tuple[str, ...]

    def problems(self) -> list[str]:
        """What would make the long run pointless."""
        found = []
        if not all(map(math.isfinite, self.losses)):
            found.append(f"the loss of a training batch is {self.losses[-1]}; check the data and the model's dtype")
        if not self.adapters:
            found.append("no adapter is trainable")
        if self.unreached:
            more = f" and {len(self.unreached) - 5} more" if len(self.unreached) > 5 else ""
            found.append(
                f"no gradient reaches {len(self.unreached)} of {self.adapters} adapters after {self.batches} batches: "
                f"{', '.join(self.unreached[:5])}{more}"
            )
        return found


def probe(model: Any, batches: Iterable[Mapping[str, Any]], precision: str = "none") -> Probe:
    """Forward and backward over `batches` until every adapter had a gradient. The model is left as it was."""
    adapters = adapted(model)
    waiting = dict(adapters)
    training, losses = model.training, []
    model.train()
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = forward(model, batch, precision).loss
            loss.backward()
            losses.append(loss.item())
            waiting = {name: tensors for name, tensors in waiting.items() if not any(map(_has_gradient, tensors))}
            if not waiting or not math.isfinite(losses[-1]):
                break
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)
    return Probe(len(losses), losses, len(adapters), tuple(waiting))


def adapted(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Adapted module -> its trainable tensors; modules that have none are left out."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, Router):
            tensors = [p for p in module.parameters() if p.requires_grad]
            if tensors:
                found[name.removeprefix("base_model.model.")] = tensors
    return found


def forward(model: Any, batch: Mapping[str, Any], precision: str = "none") -> Any:
    """The model's output for a batch of the run's collator, as Trainer would call it."""
    inputs = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in batch.items() if n != "row_ids"}
    if not needs_task_ids(model):
        inputs.pop("task_ids", None)
    with autocast(model.device.type, precision):
        return model(**inputs)


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    if precision == "none":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())

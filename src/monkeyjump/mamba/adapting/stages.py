"""What happens to the model before it trains: order folded, importance measured, adapters and gates put on.

All of it is a function of the model, the text and the seed: a run that goes on does it again, and then reads the
weights of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monkeyjump.allocation import PeftPlan, allocate_peft, attach_peft, taylor_importance
from monkeyjump.mamba.adapting.peft_format import exportable
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import GATE, channel_groups, unknown_mixers
from monkeyjump.mamba.masks import LearnedMasks, MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.presets import Adapting
from monkeyjump.mamba.text_runs.windows import Windows, collate
from monkeyjump.tasks.errors import InputError

CALIBRATION = 1_000_003  # apart from the seeds of training windows


@dataclass(frozen=True)
class Stages:
    """What was put on the model; None for what is switched off."""

    order: ChannelOrder | None
    plan: PeftPlan | None
    masks: LearnedMasks | None


def prepare(model: Any, settings: Adapting, batches: list[Any]) -> Stages:
    """Order, adapters and gates on `model`, in place. Raises InputError for what this model cannot have."""
    try:
        order = ChannelOrder(settings.order_method, seed=settings.seed) if settings.order else None
        if order is not None:
            order.update(model, batches)
        scores = channel_importance(model, batches, channel_groups(model)) if settings.masks else None
        plan = _adapters(model, settings, batches) if settings.adapters else None
        masks = attach_masks(model, _mask_config(settings), scores) if settings.masks else None
    except ValueError as error:
        raise InputError(str(error)) from error
    return Stages(order, plan, masks)


def calibration(stream: np.ndarray, settings: Any) -> list[dict[str, Any]]:
    """The batches that orders and importance are measured on."""
    size = settings.batch_size
    windows = Windows(stream, settings.context_length, settings.calibration_batches * size, CALIBRATION + settings.seed)
    made = [collate(windows[n * size + i] for i in range(size)) for n in range(settings.calibration_batches)]
    return [{name: values for name, values in batch.items() if name != "row_ids"} for batch in made]


def _adapters(model: Any, settings: Adapting, batches: list[Any]) -> PeftPlan:
    importance = taylor_importance(model, batches)
    plan = allocate_peft(
        model,
        exportable(model, importance) if settings.peft_format else importance,
        settings.peft_application_ratio,
        settings.importance_threshold,
        settings.peft_r,
        settings.peft_alpha,
    )
    torch.manual_seed(settings.seed)
    attach_peft(model, plan, batches[0])
    return plan


def _mask_config(settings: Adapting) -> MaskConfig:
    return MaskConfig(
        masking_tau=settings.masking_tau,
        final_tau=min(settings.masking_tau, MaskConfig.final_tau),
        target_sparsity=settings.target_sparsity,
        sparsity_weight=settings.sparsity_weight,
        seed=settings.seed,
    )


def lines(stages: Stages, model: Any) -> Iterator[str]:
    """What the log says before training."""
    if stages.order is not None or stages.masks is not None:
        yield from left_alone(model)
    order = stages.order
    if order is not None:
        yield f"channel order: {order.method}, {len(order.blocks)} blocks, {order.seconds:.1f} s"
        for block in order.blocks:
            if block.cost_after is not None:
                yield (
                    f"  {block.block}: correlation matrix {block.correlation_shape}, "
                    f"path cost {block.cost_before:.1f} -> {block.cost_after:.1f}"
                )
        if (cost := path_cost(order)) is not None:
            yield f"path cost of all blocks {cost_line(cost)}"
    if stages.plan is not None:
        yield from stages.plan.lines()
    trained, total = trainable(model)
    yield f"trainable parameters: {trained:,} of {total:,} ({trained / total:.2%})"


def left_alone(model: Any) -> Iterator[str]:
    """Mixers whose channels no order, mask or cut reaches."""
    for mixer, count in unknown_mixers(model).items():
        yield f"{count} x {mixer}: their channels stay as they are, in place and number"


def path_cost(order: ChannelOrder | None) -> dict[str, float] | None:
    """Of all blocks, before and after the last update, and the share that it took off; None where none was measured."""
    costs = [(b.cost_before, b.cost_after) for b in ([] if order is None else order.blocks)]
    known = [(before, after) for before, after in costs if before is not None and after is not None]
    if not known:
        return None
    before, after = (sum(ends) for ends in zip(*known))
    return {"before": before, "after": after, "reduction": 1 - after / before}


def cost_line(cost: dict[str, float]) -> str:
    return f"{cost['before']:.1f} -> {cost['after']:.1f} ({cost['reduction']:.1%} less)"


def trainable(model: Any) -> tuple[int, int]:
    """Parameters that are trained, and all; gates of masks are in neither."""
    sizes = [(p.numel(), p.requires_grad) for name, p in model.named_parameters() if f"{GATE}." not in name]
    return sum(size for size, wanted in sizes if wanted), sum(size for size, _ in sizes)


def optimizer(model: Any, settings: Adapting, masks: LearnedMasks | None) -> torch.optim.AdamW:
    """AdamW: matrices of the model decay, adapters, A_log, vectors and gates do not; gates have their own rate."""
    decayed: list[Any] = []
    plain: list[Any] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or f"{GATE}." in name:
            continue
        leaf = name.rpartition(".")[2]
        own = parameter.ndim > 1 and leaf not in ("A_log", "lora_A", "lora_B")
        (decayed if own else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain}]
    if masks is not None:
        gates = [gate.logits for gate in masks.gates.values()]
        groups.append({"params": gates, "lr": settings.gate_learning_rate})
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=settings.learning_rate, betas=(0.9, settings.beta2), weight_decay=0.0)

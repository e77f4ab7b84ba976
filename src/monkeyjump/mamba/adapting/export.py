"""What a trained run leaves: masks, order, adapters, and the merged, smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from monkeyjump.allocation import adapter_parameters, attach_peft, merge_peft, remove_peft, save_peft
from monkeyjump.allocation.attach import load_parameters
from monkeyjump.mamba.adapting.mask_files import MASKS, SavedMasks, save_masks
from monkeyjump.mamba.adapting.measures import adapter_flops, hidden_states, preservation
from monkeyjump.mamba.adapting.peft_format import write_peft
from monkeyjump.mamba.adapting.stages import Stages
from monkeyjump.mamba.masks import LearnedMasks
from monkeyjump.mamba.order import fold
from monkeyjump.mamba.order.folding import inverse
from monkeyjump.mamba.shrink import shrink
from monkeyjump.training.folder import ADAPTER
from monkeyjump.training.run import Display

ORDER, PEFT = "order", "peft"


def export(
    model: Any, stages: Stages, folder: Path, batches: list[dict[str, Tensor]], display: Display
) -> dict[str, Any]:
    """Gates off, adapters saved and merged, channels removed: `model` is plain and small afterwards.

    Masks, `adapter/` and `peft/` are written for the model as it was given; the one that is left has the order of
    `order/` folded in.
    """
    orders = {} if stages.order is None else stages.order.orders
    undone = {name: inverse(order) for name, order in orders.items()}
    if stages.order is not None:
        stages.order.save(folder / ORDER)
    found: dict[str, Any] = {"peft": [], "peft_refused": {}}
    kept = None
    if stages.masks is not None:
        kept, masks = stages.masks.kept(), SavedMasks.of(stages.masks)
        save_masks(masks.reordered(undone) if undone else masks, folder / MASKS)
        found["information_preservation"] = _take_masks_off(model, stages.masks, batches)
    if stages.plan is not None:
        fold(model, undone)
        _renew_adapters(model, stages)
        save_peft(model, folder / ADAPTER)
        written, found["peft_refused"] = write_peft(model, stages.plan, folder / PEFT, display)
        found["peft"] = [str(path.relative_to(folder)) for path in written]
        fold(model, orders)
        found["adapter_flops_per_pass"] = adapter_flops(model, stages.plan)
        merge_peft(model)
    found["parameters_before"] = model.num_parameters()
    if stages.masks is not None and kept is not None:
        before = {name: group.units for name, group in stages.masks.groups.items()}
        found |= unit_counts(before, kept)
        shrink(model, kept)
    return {**found, "parameters": model.num_parameters()}


def _take_masks_off(model: Any, masks: LearnedMasks, batches: list[dict[str, Tensor]]) -> float:
    """Returns how much of the hidden states' direction the masks had left."""
    masks.decide(masks.config.target_sparsity)
    masked = [hidden_states(model, batch) for batch in batches]
    masks.remove()
    return preservation(masked, [hidden_states(model, batch) for batch in batches])


def _renew_adapters(model: Any, stages: Stages) -> None:
    """The base was folded in training: adapters that are put on anew have the fingerprint of what it is now."""
    assert stages.plan is not None
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    remove_peft(model)
    attach_peft(model, stages.plan, None)
    load_parameters(model, tensors)


def unit_counts(before: dict[str, int], kept: dict[str, Tensor]) -> dict[str, Any]:
    """How many units there were by block and how many are left, for result.json."""
    left = {name: len(units) for name, units in kept.items()}
    return {
        "units_before": sum(before.values()),
        "units": sum(left.values()),
        "units_by_block": left,
        "sparsity": 1 - sum(left.values()) / sum(before.values()),
        "sparsity_by_block": {name: 1 - left[name] / before[name] for name in before},
    }

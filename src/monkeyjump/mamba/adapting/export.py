"""What a trained run leaves: the adapters, the order they belong to, and the merged, smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monkeyjump.allocation import (
    adapter_parameters,
    attach_peft,
    export_peft,
    merge_peft,
    remove_peft,
    save_peft,
)
from monkeyjump.allocation.attach import load_parameters
from monkeyjump.mamba.adapting.stages import Stages
from monkeyjump.mamba.shrink import shrink
from monkeyjump.training.folder import ADAPTER
from monkeyjump.training.run import Display

ORDER, PEFT = "order", "peft"


def export(model: Any, stages: Stages, folder: Path, display: Display) -> dict[str, Any]:
    """Gates off, adapters saved and merged, channels removed: `model` is plain and small afterwards.

    `adapter/` belongs to the base model with the order in `order/` folded in (`fold(model, order.orders)`).
    """
    kept = None if stages.masks is None else stages.masks.kept()
    if stages.masks is not None:
        stages.masks.remove()
    if stages.order is not None:
        stages.order.save(folder / ORDER)
    peft = _save_adapters(model, stages, folder, display) if stages.plan is not None else []
    before = model.num_parameters()
    found: dict[str, Any] = {"parameters_before": before, "peft": peft}
    if kept is not None and stages.masks is not None:
        units = sum(group.units for group in stages.masks.groups.values())
        left = sum(len(one) for one in kept.values())
        shrink(model, kept)
        found |= {"units_before": units, "units": left, "sparsity": 1 - left / units}
        found["units_by_block"] = {name: len(one) for name, one in kept.items()}
    return {**found, "parameters": model.num_parameters()}


def _save_adapters(model: Any, stages: Stages, folder: Path, display: Display) -> list[str]:
    """The base was folded anew in training: its fingerprint is that of now, so the adapters are put on again."""
    assert stages.plan is not None
    tensors = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    remove_peft(model)
    attach_peft(model, stages.plan, None)
    load_parameters(model, tensors)
    save_peft(model, folder / ADAPTER)
    try:
        written = [str(path.relative_to(folder)) for path in export_peft(model, folder / PEFT)]
    except ValueError as error:
        display.note(f"not exported in PEFT's format: {error}")
        written = []
    merge_peft(model)
    return written

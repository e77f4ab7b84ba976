"""An allocation on disk: `allocation.json` (kinds, ranks, scores, method, scale) and `adapters.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from monkeyjump.allocation.attach import (
    adapter_parameters,
    attach_peft,
    attached,
    load_parameters,
    probe_gradients,
    remove_peft,
)
from monkeyjump.allocation.importance import Batch, Loss, model_loss
from monkeyjump.allocation.plan import PeftPlan, plan_from
from monkeyjump.tasks.cache import folder_in_one_piece, verify_manifest, write_manifest
from monkeyjump.tuner.folder import check_fingerprint

PLAN, WEIGHTS, FORMAT = "allocation.json", "adapters.safetensors", 1


def save_peft(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of a model and their allocation; the folder appears whole or not at all.

    Raises:
        ValueError: nothing is attached.
    """
    found = attached(model)
    tensors = {name: parameter.detach().contiguous() for name, parameter in adapter_parameters(model).items()}
    record = {"format": FORMAT, "base_fingerprint": found.base_fingerprint, **found.plan.as_record()}
    with folder_in_one_piece(Path(folder)) as aside:
        save_file(tensors, aside / WEIGHTS)
        (aside / PLAN).write_text(json.dumps(record, indent=1), encoding="utf-8")
        write_manifest(aside)


def load_peft(model: nn.Module, folder: str | Path, probe: Batch | None = None, loss: Loss = model_loss) -> PeftPlan:
    """Attach what `save_peft` wrote to the base model.

    Args:
        probe: a batch with labels, to go on training (see `attach_peft`); None: for inference, nothing trains.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the model, which is then as it was.
        InputError: a file is not the one that was written.

    Warns:
        UserWarning: the base model holds other weights than those that the adapters were trained on.
    """
    folder = Path(folder)
    plan, base = _read_plan(folder)
    verify_manifest(folder)
    check_fingerprint(model, base)
    attach_peft(model, plan, None)
    try:
        load_parameters(model, load_file(folder / WEIGHTS))
        if probe is not None:
            for parameter in adapter_parameters(model).values():
                parameter.requires_grad_(True)
            probe_gradients(model, probe, loss)
    except (ValueError, SafetensorError):
        remove_peft(model)
        raise
    return plan


def _read_plan(folder: Path) -> tuple[PeftPlan, Any]:
    """The plan, and what there is to compare the base model with."""
    path = folder / PLAN
    if not path.is_file():
        raise ValueError(f"{path} is missing; give a folder that save_peft wrote")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.pop("format")
        base = SimpleNamespace(base_fingerprint=record.pop("base_fingerprint"), base_model_name_or_path=None)
        plan = plan_from(record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no allocation ({error}); copy the folder again") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version} is not known to this version, which reads format {FORMAT}")
    return plan, base

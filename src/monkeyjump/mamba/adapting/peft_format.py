"""What PEFT's own format can hold of an adapted Mamba: adapters on modules that the stock mixer calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monkeyjump.allocation import Importance, PeftPlan, export_peft
from monkeyjump.allocation.export import why_not_exported
from monkeyjump.mamba import patch_mamba, unpatch_mamba
from monkeyjump.mamba.patch import STOCK
from monkeyjump.training.run import Display


def exportable(model: Any, importance: Importance) -> Importance:
    """The scores of the modules on which PEFT's format can hold LoRA (IA³ then as well).

    Raises ValueError if there is none.
    """
    with _stock(model):
        scores = {name: score for name, score in importance.scores.items() if not why_not_exported(model, name, "lora")}
    if not scores:
        raise ValueError("peft_format: PEFT can adapt no module of this model; switch it off")
    return Importance(importance.method, scores)


def write_peft(model: Any, plan: PeftPlan, folder: Path, display: Display) -> tuple[list[Path], dict[str, str]]:
    """The folders written, and why not for each module that PEFT cannot adapt: with one of them, nothing is written.

    A part of the adapters would load without an error, and be another model.
    """
    with _stock(model):
        tuned = [one for one in plan.modules if one.kind != "frozen"]
        reasons = {one.name: why_not_exported(model, one.name, one.kind) for one in tuned}
        refused = {name: reason for name, reason in reasons.items() if reason is not None}
        if not refused:
            return export_peft(model, folder), {}
    display.note(f"{folder.name}/ is not written: PEFT's format cannot hold {len(refused)} of {len(tuned)} adapters")
    for name, reason in refused.items():
        display.note(f"  {name}: {reason}")
    display.note("adapter/ has all of them; --peft-format keeps to modules that PEFT can adapt")
    return [], refused


@contextmanager
def _stock(model: Any) -> Iterator[None]:
    """What PEFT loads adapters onto: Hugging Face's own mixers, which call fewer of their modules than ours."""
    patched = any(type(module) in STOCK for module in model.modules())
    unpatch_mamba(model)
    try:
        yield
    finally:
        if patched:
            patch_mamba(model)

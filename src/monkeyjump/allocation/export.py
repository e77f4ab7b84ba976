"""The adapters in PEFT's own format: one folder for its LoRA, one for its IA³.

PEFT adapts where modules are called. What this model reads otherwise (`dt_proj` and `conv1d` of Mamba), and what
PEFT itself refuses, cannot be exported; merge those into the weights and save the model instead.

    export_peft(model, "out")
    plain = PeftModel.from_pretrained(base, "out/lora").merge_and_unload()
    PeftModel.from_pretrained(plain, "out/ia3")
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.allocation.attach import adapter_parameters, attached
from monkeyjump.allocation.plan import Kind, ModulePlan, PeftPlan
from monkeyjump.tasks.cache import folder_in_one_piece
from monkeyjump.tuner.folder import PREFIX
from monkeyjump.tuner.reach import why_silent


def export_peft(model: nn.Module, folder: str | Path) -> list[Path]:
    """Write the adapters so that `PeftModel.from_pretrained` loads them.

    Returns:
        The folders written: "lora" and "ia3", as far as the plan has such modules.

    Raises:
        ValueError: nothing is attached, or PEFT cannot adapt some modules of this model; they are named.
    """
    plan = attached(model).plan
    reasons = [
        f"{one.name} ({reason})"
        for one in plan.modules
        if one.kind != "frozen" and (reason := why_not_exported(model, one.name, one.kind))
    ]
    if reasons:
        more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise ValueError(
            f"PEFT cannot adapt {'; '.join(reasons[:3])}{more}; merge_peft(model) and save the model, or allocate "
            "without these modules"
        )
    written = []
    for kind, make in (("lora", _lora), ("ia3", _ia3)):
        members = plan.of(kind)  # type: ignore[arg-type]
        if members:
            path = Path(folder) / kind
            config, tensors = make(model, plan, members)
            with folder_in_one_piece(path) as aside:
                config.save_pretrained(aside)
                save_file(tensors, aside / SAFETENSORS_WEIGHTS_NAME)
            written.append(path)
    return written


def why_not_exported(model: nn.Module, name: str, kind: Kind) -> str | None:
    """Why PEFT's format cannot hold an adapter of this kind on a module of this model; None where it can."""
    if isinstance(model.get_submodule(name), nn.Conv1d):
        return "a depthwise convolution"
    if kind == "lora":
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
        except ValueError:
            return "PEFT refuses LoRA on it in a Mamba model"
    return why_silent(model, name, training=True)


def _lora(model: nn.Module, plan: PeftPlan, members: list[ModulePlan]) -> tuple[LoraConfig, dict[str, Tensor]]:
    names = [one.name for one in members]
    config = LoraConfig(
        r=members[0].rank,
        lora_alpha=plan.scale * members[0].rank,
        target_modules=names,
        rank_pattern={re.escape(one.name): one.rank for one in members},
        alpha_pattern={re.escape(one.name): plan.scale * one.rank for one in members},
        **_common(model, names),
    )
    return config, _tensors(model, names, {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"})


def _ia3(model: nn.Module, plan: PeftPlan, members: list[ModulePlan]) -> tuple[IA3Config, dict[str, Tensor]]:
    names = [one.name for one in members]
    config = IA3Config(target_modules=names, feedforward_modules=[], **_common(model, names))
    tensors = _tensors(model, names, {"ia3_l": "ia3_l"})
    return config, {name: factors.unsqueeze(1) for name, factors in tensors.items()}


def _common(model: nn.Module, names: list[str]) -> dict[str, Any]:
    return {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None),
        "fan_in_fan_out": any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        "inference_mode": True,
    }


def _tensors(model: nn.Module, names: list[str], kinds: dict[str, str]) -> dict[str, Tensor]:
    own = adapter_parameters(model)
    return {
        f"{PREFIX}{name}.{theirs}": own[f"{name}.{ours}"].detach().contiguous()
        for name in names
        for ours, theirs in kinds.items()
    }

"""Every mixture: its config on the tiny Llama, and a model with experts that do something."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from monkeyjump.moe import ExpertConfig, HydraLoRAConfig, MoEConfig, MoELoRAConfig, MoLAConfig
from tiny import LLAMA_TARGETS, llama, position_dependent, trainable

ADALORA = {"base": "adalora", "init_r": 3, "target_r": 2, "total_step": 10}
METHODS: dict[str, tuple[type[ExpertConfig], dict[str, Any]]] = {
    "moelora": (MoELoRAConfig, {"r": 2}),
    "hydralora": (HydraLoRAConfig, {"r": 2}),
    "mola": (MoLAConfig, {"r": 2, "num_experts": [2, 4]}),
    "moe_lora": (MoEConfig, {"base": "lora", "r": 2}),
    "moe_lora_fa": (MoEConfig, {"base": "lora_fa", "r": 2}),
    "moe_adalora": (MoEConfig, ADALORA),
    "moe_propulsion": (MoEConfig, {"base": "propulsion"}),
}


def mixture_config(name: str, **changes: Any) -> ExpertConfig:
    """The method's config, without dropout and with experts that act from the start."""
    kind, own = METHODS[name]
    settings = {"target_modules": list(LLAMA_TARGETS), "init_weights": False, "task_type": "CAUSAL_LM", **own}
    if own.get("base") != "propulsion":
        settings["lora_dropout"] = 0.0
    return kind(**{**settings, **changes})


def mixture(name: str, base_model: nn.Module | None = None, **changes: Any) -> PeftModel:
    """A mixture in which no two elements of a weight are alike."""
    base_model = base_model or llama()  # before the seed: it has one of its own
    torch.manual_seed(1)
    model = get_peft_model(base_model, mixture_config(name, **changes))
    position_dependent(trainable(model).values(), size=0.02 if name == "moe_propulsion" else 0.1)
    return model.eval()

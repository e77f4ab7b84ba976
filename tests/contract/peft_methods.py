"""Every method that can be routed: its arguments on the tiny Llama, routed and plain."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from monkeyjump import MonkeyJumpConfig
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.registry import routable
from tiny import LLAMA_TARGETS, llama, position_dependent, trainable

CORE = ("adalora", "lora", "lora_fa", "propulsion")  # the four of the paper: nothing of theirs is slow
SHARED = ["o_proj"]
ROUTED = [target for target in LLAMA_TARGETS if target not in SHARED]

# what a method needs to fit projections of 16, 32 and 48 features
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 10, "init_r": 3, "target_r": 2},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 30},
    "hra": {"r": 2},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "miss": {"r": 4},
    "oft": {"r": 0, "oft_block_size": 8},
    "psoft": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "vblora": {"vector_length": 16, "num_vectors": 20},
    "vera": {"r": 4},
    "waveft": {"n_frequency": 30},
}


def arguments(base: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the method itself, the same for its plain and its routed adapters."""
    own = ARGUMENTS.get(base, {})
    if issubclass(plain_class(base), LoraConfig):
        own = {"lora_alpha": 8, "lora_dropout": 0.0, **own}  # the routed defaults are others than PEFT's
    return {"target_modules": list(LLAMA_TARGETS), **own, **changes}


def plain_class(base: str) -> type[PeftConfig]:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[base.upper()]]


def plain_config(base: str, **changes: Any) -> PeftConfig:
    return plain_class(base)(**arguments(base, **changes))


def routed_config(base: str, **routing: Any) -> MonkeyJumpConfig:
    settings = {"shared_modules": SHARED, "center_init": "random", **routing}
    return MonkeyJumpConfig(base=base, **{**arguments(base), **settings})


def plain_model(base: str, base_model: nn.Module | None = None, **changes: Any) -> PeftModel:
    """Plain PEFT's adapters, at their start, which mostly does nothing."""
    torch.manual_seed(1)
    return get_peft_model(base_model or llama(), plain_config(base, **changes))


def routed_model(base: str, base_model: nn.Module | None = None, **routing: Any) -> PeftModel:
    """Routed adapters that do something: no two elements of their weights are alike."""
    torch.manual_seed(1)
    model = get_peft_model(base_model or llama(), routed_config(base, **routing))
    disturb(model)
    return model.eval()


def disturb(model: PeftModel) -> None:
    """Give every weight that trains, and the centers, a value that depends on its position."""
    position_dependent(trainable(model).values())
    position_dependent(router.centers["default"] for router in routers(model))


def methods() -> list[str]:
    return routable()

"""Named settings: the recommended one, the paper's, its ablations', and those of the released code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Preset:
    """One setting, split by who takes it.

    Attributes:
        config: fields of `MonkeyJumpConfig`.
        center_update: arguments of `CenterUpdate`.
        initialize_centers: arguments of `initialize_centers`.
    """

    config: dict[str, Any] = field(default_factory=dict)
    center_update: dict[str, Any] = field(default_factory=lambda: {"every": 2, "until": 0.6})
    initialize_centers: dict[str, Any] = field(default_factory=lambda: {"max_tokens": 50_000, "iterations": 50})


# Padding never counts and no gradient passes the gates under any of them: in the released code both
# happen, as faults and not as choices.
PRESETS: dict[str, Preset] = {
    "recommended": Preset(),
    # Table 13 (text; image and video use r=1)
    "paper": Preset(
        config={"r": 2, "lora_alpha": 5, "lora_dropout": 0.05, "gate_norm": "none", "ema_space": "raw"},
        center_update={"every": 2, "until": 5000},
    ),
    # the defaults of the released code
    "released": Preset(
        config={
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": ATTENTION,
            "shared_modules": [],
            "expert_order": "targets",
            "granularity": "last",
            "top_k": 1,
            "gate_norm": "one",
            "ema_momentum": 0.9,
            "ema_assignment": "top1",
            "ema_space": "mixed",
        },
        center_update={"every": 10, "until": 1000},
        initialize_centers={"max_tokens": None, "max_samples": 2000, "iterations": 15},
    ),
    # the table in the README of the released code
    "readme": Preset(
        config={
            "r": 2,
            "lora_alpha": 16,
            "lora_dropout": 0.0,
            "target_modules": [*ATTENTION, "up_proj", "down_proj"],
            "shared_modules": ["up_proj", "down_proj"],
            "expert_order": "targets",
            "gate_norm": "one",
            "jitter_noise": 0.1,
            "ema_momentum": 0.9,
            "ema_assignment": "top1",
            "ema_space": "mixed",
        },
        center_update={"every": 2, "until": 3000},
        initialize_centers={"max_tokens": None, "max_samples": 4000, "iterations": 15},
    ),
    # the 0.5B model of the ablations: q, k, v, o, all routed
    "ablation": Preset(
        config={
            "r": 2,
            "lora_alpha": 5,
            "lora_dropout": 0.05,
            "target_modules": ATTENTION,
            "shared_modules": [],
            "gate_norm": "none",
        },
    ),
}

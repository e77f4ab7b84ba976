"""Named starting points for a whole run. A run's file may say `preset: paper`; what it says itself wins."""

from __future__ import annotations

from typing import Any

from monkeyjump.tasks.errors import InputError, near_miss

# Table 13; it trains methods without A with a larger rate
_PAPER_RATES = {"lora_fa": 4e-4, "propulsion": 4e-4}
_PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
_PAPER_CENTERS = {"max_tokens": 50_000, "every": 2, "until": 5000}
_PAPER_TRAIN = {"epochs": 2, "scheduler": "cosine", "warmup": 0.1, "weight_decay": 0.1, "precision": "bf16"}
_VISION_TRAIN = {**_PAPER_TRAIN, "batch_size": 1, "accumulation": 8}
# vision-language models have projections of the same names in their picture tower, which stays as it is
_LANGUAGE = r".*language_model.*\.({})"
# the rank of Table 13 for pictures and videos, as each method calls it
_RANK_ONE: dict[str, dict[str, int]] = {"adalora": {"target_r": 1, "init_r": 2}, "propulsion": {}}

RUN_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "model": {"dtype": "bfloat16"},
        "method": {"preset": "paper", "target_modules": _PAPER_TARGETS, "centers": _PAPER_CENTERS},
        "data": {"size": "full", "max_length": 1024},
        "train": {**_PAPER_TRAIN, "batch_size": 4, "accumulation": 4},
    },
    "paper-vision": {
        "model": {"dtype": "bfloat16"},
        "method": {
            "preset": "paper",
            "target_modules": _LANGUAGE.format("|".join(_PAPER_TARGETS)),
            "centers": _PAPER_CENTERS,
        },
        "data": {"size": "full", "max_length": 2048},
        "train": _VISION_TRAIN,
    },
    "paper-ablation": {
        "model": {"dtype": "bfloat16"},
        "method": {
            "preset": "ablation",
            "target_modules": _LANGUAGE.format("|".join(_PAPER_TARGETS[:4])),
            "centers": {"max_tokens": 50_000},
        },
        "data": {"size": "full", "max_length": 1024},
        "train": {**_PAPER_TRAIN, "batch_size": 4, "accumulation": 4},
    },
    "demo": {
        "model": {"path": "demo"},
        "method": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "centers": {"max_tokens": 4000}},
        "data": {"size": "small", "max_length": 256},
        "train": {
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup": 2,
            "log_every": 1,
            "save_every": 8,
        },
    },
}


def find_preset(name: str, base: str) -> dict[str, Any]:
    """The values of a preset; the paper's learning rate depends on the method. Raises InputError."""
    if name not in RUN_PRESETS:
        raise InputError(f"preset: unknown preset '{name}'", hint=near_miss(name, RUN_PRESETS, "presets"))
    values = RUN_PRESETS[name]
    if not name.startswith("paper"):
        return values
    key = base.lower().removeprefix("moe_")  # a mixture is trained as what it is a mixture of
    rank = _RANK_ONE.get(key, {"r": 1}) if name == "paper-vision" else {}
    return {
        **values,
        "method": {**values["method"], **rank},
        "train": {**values["train"], "learning_rate": _PAPER_RATES.get(key, 1e-4)},
    }

"""Trainable parameters of every method on the shapes of LLaVA-OneVision-Qwen2-0.5B: q, k, v, o; r 2; N 4."""

from __future__ import annotations

import pytest
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from test_counts import qwen2_half_a_billion

from monkeyjump import LoraFAConfig, PropulsionConfig
from monkeyjump.moe import HydraLoRAConfig, MoEConfig, MoELoRAConfig, MoLAConfig
from tiny import trainable

ADALORA = {"init_r": 2, "target_r": 2, "total_step": 10}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LoraConfig(r=2), 270_336),
        (LoraFAConfig(r=2), 98_304),
        (AdaLoraConfig(**ADALORA), 270_528),
        (PropulsionConfig(), 49_152),
        (MoEConfig(base="lora", r=2), 1_425_408),
        (MoELoRAConfig(r=2), 1_425_408),
        (MoLAConfig(r=2, num_experts=4), 1_425_408),
        (MoLAConfig(r=2, num_experts="1357"), 1_425_408),
        (MoLAConfig(r=2, num_experts="2468"), 1_781_760),
        (MoEConfig(base="lora_fa", r=2), 737_280),
        (MoEConfig(base="adalora", **ADALORA), 1_426_176),
        (MoEConfig(base="propulsion"), 540_672),
        (HydraLoRAConfig(r=2), 909_312),
    ],
    ids=lambda value: str(value.peft_type.value) if isinstance(value, PeftConfig) else f"{value:,}",
)
def test_trainable_parameters_are_those_of_the_definition(config: PeftConfig, count: int) -> None:
    config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = trainable(get_peft_model(qwen2_half_a_billion(), config))
    # PEFT's AdaLoRA lets its constant ranknum train where it casts or moves it
    assert sum(p.numel() for name, p in trained.items() if "ranknum" not in name) == count

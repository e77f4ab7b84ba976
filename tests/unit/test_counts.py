"""Trainable parameters: the paper's exact numbers, on its 0.5B shapes without any weights."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from monkeyjump import MonkeyJumpConfig, describe_routing


def qwen2_half_a_billion() -> Qwen2ForCausalLM:
    """The language tower of LLaVA-OneVision-Qwen2-0.5B: 24 blocks, d 896, k and v 128 wide."""
    shape = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    }
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**shape))


@pytest.mark.parametrize(
    ("base", "extra", "count"),
    [
        ("propulsion", {}, 49_152),
        ("lora_fa", {"r": 2}, 98_304),
        ("lora", {"r": 2}, 270_336),
        # Table 4's r^2 for AdaLoRA contradicts Figure 2; its singular values are a vector
        ("adalora", {"init_r": 2, "target_r": 2, "total_step": 10}, 270_528),
    ],
)
def test_trainable_parameters_are_the_papers(base: str, extra: dict[str, int], count: int) -> None:
    config = MonkeyJumpConfig(base=base, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **extra)
    model = get_peft_model(qwen2_half_a_billion(), config)
    assert model.get_nb_trainable_parameters()[0] == count
    plan = describe_routing(model)
    assert plan.trainable_parameters == count
    assert len(plan.blocks) == 24

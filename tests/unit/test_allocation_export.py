"""Adapters in PEFT's format: what PeftModel loads has our logits; what PEFT cannot adapt is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_allocation_attach import adapted, alternating, gpt2, llama, logits, mamba, mamba2
from torch import nn

from monkeyjump.allocation import allocate_peft, export_peft, uniform_peft


def called_by_mamba(model: nn.Module):
    """LoRA on some, IA³ on other modules that transformers' mixer calls."""
    scores = {f"backbone.layers.{i}.mixer.{leaf}": i for i in range(2) for leaf in ("in_proj", "x_proj")}
    return allocate_peft(model, scores, 1.0, 0.5, peft_r=2, peft_alpha=5)


@pytest.mark.parametrize(
    ("make", "plan"),
    [(llama, alternating), (gpt2, alternating), (mamba, called_by_mamba)],
    ids=("llama", "gpt2", "mamba"),
)
def test_peft_loads_it_with_equal_logits(make: Callable[[], nn.Module], plan: Callable, tmp_path: Path):
    model = adapted(make, plan)
    model.config.name_or_path = "some/model"
    assert export_peft(model, tmp_path) == [tmp_path / "lora", tmp_path / "ia3"]
    for kind in ("lora", "ia3"):
        config = json.loads((tmp_path / kind / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["inference_mode"]) == ("some/model", True)
    plain = PeftModel.from_pretrained(make(), tmp_path / "lora").merge_and_unload()
    both = PeftModel.from_pretrained(plain, tmp_path / "ia3")
    torch.testing.assert_close(logits(both), logits(model), atol=1e-6, rtol=1e-5)
    assert (logits(both) - logits(make())).abs().max() > 1e-3


def test_ranks_of_a_budget_and_a_plan_of_one_kind(tmp_path: Path):
    model = adapted(llama, lambda model: uniform_peft(model, "lora", peft_r=8, peft_alpha=20, budget=2500))
    assert {one.rank for one in model.allocated_peft.plan.modules} == {2, 3}
    assert export_peft(model, tmp_path) == [tmp_path / "lora"]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == {2, 3}
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "kind", "leaf", "reason"),
    [
        (mamba, "lora", "dt_proj", r"MambaMixer reads dt_proj\.weight directly"),
        (mamba, "ia3", "dt_proj", r"MambaMixer reads dt_proj\.weight directly"),
        (mamba, "lora", "conv1d", "a depthwise convolution"),
        (mamba, "ia3", "conv1d", "a depthwise convolution"),
        (mamba, "lora", "out_proj", "PEFT refuses LoRA on it in a Mamba model"),
        (mamba, "ia3", "out_proj", r"the fused kernel of MambaMixer reads out_proj\.weight"),
        (mamba2, "lora", "out_proj", "PEFT refuses LoRA on it in a Mamba model"),
    ],
)
def test_what_peft_cannot_adapt_is_named(
    make: Callable[[], nn.Module], kind: str, leaf: str, reason: str, tmp_path: Path
):
    model = adapted(make, lambda model: uniform_peft(model, kind, only=[leaf], peft_r=2))
    message = rf"PEFT cannot adapt .*mixer\.{leaf} \({reason}.*; merge_peft\(model\) and save"
    with pytest.raises(ValueError, match=message):
        export_peft(model, tmp_path)
    assert not any(tmp_path.iterdir())

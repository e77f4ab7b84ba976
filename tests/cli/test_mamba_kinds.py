"""`monkeyjump mamba adapt` of Mamba-2 and FalconMamba: all pillars, each alone, and what reads the folder next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mamba_inputs import FAST, result, write_base

from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model

ALONE = {
    "all": (),
    "order": ("--no-masks", "--no-adapters"),
    "masks": ("--no-order", "--no-adapters"),
    "adapters": ("--no-order", "--no-masks"),
}
UNITS = {"mamba2": 16, "falcon_mamba": 64}  # heads, channels: of two layers


@pytest.fixture
def folder(mamba_folder: Path) -> Path:
    return mamba_folder


@pytest.mark.parametrize("pillars", ALONE)
@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba"])
def test_the_pillars_and_the_table(mamba, folder: Path, kind: str, pillars: str):
    write_base(folder, kind)
    correlation = ("--set", "order_method=correlation")
    code, lines = mamba(
        "adapt", "model", "text.txt", "--output", "out", "--steps", "4", *ALONE[pillars], *FAST, *correlation
    )
    assert code == 0, lines
    found, model, base = result(folder / "out"), load_model("out"), load_model("model")
    said = "\n".join(lines)
    assert found["parameters_before"] == base.num_parameters()
    assert found["parameters"] == model.num_parameters()
    assert f"{base.num_parameters():,}" in said
    assert f"{model.num_parameters():,}" in said
    assert f"{found['held_out']['after']['perplexity']:.3f}" in said
    masked = pillars in ("all", "masks")
    left = UNITS[kind] // 2 if masked else UNITS[kind]
    assert sum(group.units for group in channel_groups(model).values()) == left
    assert (
        found["efficiency"]["after"]["flops_per_token"] < found["efficiency"]["before"]["flops_per_token"]
    ) == masked
    assert ("average sparsity 0.500, target 0.5" in said) == masked
    assert ("information preservation" in said) == masked
    assert ("latency without the order" in said) == (pillars in ("all", "order"))
    assert ("LoRA: " in said) == (pillars in ("all", "adapters"))
    assert found["parameter_reduction"] == pytest.approx(
        1 - found["trainable_parameters"] / base.num_parameters() if pillars in ("all", "adapters") else 0
    )
    code, lines = mamba("perplexity", "out", "text.txt", "--window", "24", "--json")
    assert code == 0, lines


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_a_shrunk_model_scores_generates_and_adapts(mamba, folder: Path, kind: str):
    write_base(folder, kind)
    assert mamba("shrink", "model", "--text", "text.txt", "--output", "half")[0] == 0
    assert mamba("perplexity", "half", "text.txt", "--window", "24")[0] == 0
    half, ids = load_model("half"), torch.arange(10, 18)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(half.generate(ids, **options), half.generate(ids, use_cache=False, **options))
    code, lines = mamba("adapt", "half", "text.txt", "--output", "out", "--steps", "3", *FAST)
    assert code == 0, lines
    found = result(folder / "out")
    assert found["units"] == found["units_before"] // 2
    assert found["parameters_before"] == half.num_parameters()
    assert load_model("out").num_parameters() == found["parameters"] < half.num_parameters()

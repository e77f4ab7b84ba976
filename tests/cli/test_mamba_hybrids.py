"""`monkeyjump mamba adapt` and `shrink` of Mamba layers beside attention, and what reads the folders next."""

from __future__ import annotations

from pathlib import Path

import pytest
from mamba_inputs import FAST, result, write_base

from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model


@pytest.fixture
def folder(mamba_folder: Path) -> Path:
    return mamba_folder


def units(model: str) -> dict[str, int]:
    return {name: group.units for name, group in channel_groups(load_model(model)).items()}


def test_a_bamba_is_adapted_and_cut_again_by_its_masks(mamba, folder: Path):
    write_base(folder, "bamba")
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "4", *FAST)
    assert code == 0, lines
    assert units("model") == {"model.layers.0.mamba": 8, **{f"model.layers.{n}.feed_forward": 24 for n in (0, 1)}}
    assert sum(units("out").values()) == result(folder / "out")["units"] == 28
    assert units("out")["model.layers.0.mamba"] in (2, 4, 6, 8)
    code, lines = mamba("perplexity", "out", "text.txt", "--window", "24", "--json")
    assert code == 0, lines
    again = ("--masks", "out", "--sparsity", "0.25", "--order", "importance", "--repair")
    code, lines = mamba("shrink", "model", "--text", "text.txt", *again, "--output", "more")
    assert code == 0, lines
    assert sum(units("more").values()) == result(folder / "more")["units"] == 42
    assert not any("stay as they are" in line for line in lines)


def test_mixers_whose_channels_stay_are_said(mamba, folder: Path):
    write_base(folder, "falcon_h1")
    said = "2 x FalconH1Mixer: their channels stay as they are, in place and number"
    for words in (("adapt", "model", "text.txt", "--steps", "4", *FAST), ("shrink", "model", "--text", "text.txt")):
        code, lines = mamba(*words, "--output", words[0])
        assert code == 0, lines
        assert any(said in line for line in lines)
        assert sum(units(words[0]).values()) == 24  # of two MLPs
        assert load_model(words[0]).model.layers[0].mamba.in_proj.weight.shape == (32 + 48 + 8, 16)
    adapters = ("--no-order", "--no-masks")
    code, lines = mamba("adapt", "model", "text.txt", "--steps", "4", *FAST, *adapters, "--output", "alone")
    assert code == 0, lines
    assert not any("stay as they are" in line for line in lines)

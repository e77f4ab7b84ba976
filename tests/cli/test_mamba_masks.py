"""`monkeyjump mamba shrink --masks`: cut by what a run has learned, as that run cut or at another sparsity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from mamba_inputs import FAST, result, write_base
from safetensors.torch import load_file, save_file

from monkeyjump.allocation import load_peft, merge_peft
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.loading import load_model
from monkeyjump.mamba.selection import select_kept

IDS = torch.arange(20)[None]


@pytest.fixture
def folder(mamba_folder: Path) -> Path:
    return mamba_folder


def merged(kind: str, folder: Path) -> Path:
    """The dense model that the run trained: the base with its adapters."""
    base = load_model(folder / "model")
    load_peft(base, folder / "out" / "adapter")
    merge_peft(base)
    shutil.copytree(folder / "model", folder / "merged")
    base.save_pretrained(folder / "merged")
    return folder / "merged"


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("order", ["--no-order", "--order"])
def test_the_cut_equals_what_adapt_exports(mamba, folder: Path, kind: str, order: str):
    write_base(folder, kind)
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "8", order, *FAST)
    assert code == 0, lines
    merged(kind, folder)
    code, lines = mamba("shrink", "merged", "--text", "text.txt", "--masks", "out", "--output", "cut")
    assert code == 0, lines
    run, cut = result(folder / "out"), result(folder / "cut")
    assert cut["units_by_block"] == run["units_by_block"]
    assert cut["sparsity"] == run["sparsity"] == 0.5
    found, expected = load_model("cut"), load_model("out")
    with torch.no_grad():
        assert (found(input_ids=IDS).logits - expected(input_ids=IDS).logits).abs().max() < 1e-5
    if order == "--no-order":
        assert all(torch.equal(one, expected.get_parameter(name)) for name, one in found.named_parameters())


def test_another_sparsity_ranks_the_learned_logits_again(mamba, folder: Path):
    code, lines = mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "8", *FAST)
    assert code == 0, lines
    saved = load_file("out/masks.safetensors")
    logits = {name.removeprefix("logits."): found for name, found in saved.items() if name.startswith("logits.")}
    assert all(found.abs().max() < 20 for found in logits.values())  # before the choice was written into them
    assert mamba("shrink", "model", "--text", "text.txt", "--masks", "out/masks.safetensors", "--sparsity", "0.75",
                 "--output", "more")[0] == 0  # fmt: skip
    groups = channel_groups(load_model("model"))
    kept = select_kept(groups, logits, 0.75)
    made = load_model("more")
    for name, units in kept.items():
        block = load_model("model").get_submodule(name)
        assert torch.equal(made.get_submodule(name).D, block.D[units])
        assert torch.equal(made.get_submodule(name).A_log, block.A_log[units])
    assert result(folder / "more")["units_by_block"] == {name: len(units) for name, units in kept.items()}
    # the choice at the learned sparsity is the one of these logits
    at_half = select_kept(groups, logits, 0.5)
    assert all(torch.equal(saved[f"kept.{name}"].nonzero().flatten(), units) for name, units in at_half.items())


def test_after_an_order_whole_blocks_of_the_learned_logits_go(mamba, folder: Path):
    assert mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "4", *FAST)[0] == 0
    same = ("shrink", "model", "--text", "text.txt", "--masks", "out")
    code, lines = mamba(*same, "--order", "importance", "--block", "8", "--output", "blocks")
    assert code == 0, lines
    assert all(units % 8 == 0 for units in result(folder / "blocks")["units_by_block"].values())
    # an order alone changes nothing that is cut: same channels, elsewhere
    assert mamba(*same, "--output", "plain")[0] == 0
    assert mamba(*same, "--order", "random", "--output", "moved")[0] == 0
    with torch.no_grad():
        plain, moved = (load_model(name)(input_ids=IDS).logits for name in ("plain", "moved"))
    assert (plain - moved).abs().max() < 1e-5


def test_masks_that_do_not_fit_or_are_none(mamba, folder: Path):
    assert mamba("adapt", "model", "text.txt", "--output", "out", "--steps", "2", *FAST)[0] == 0
    assert mamba("adapt", "model", "text.txt", "--output", "bare", "--steps", "1", "--no-masks", *FAST)[0] == 0
    (folder / "other").mkdir()
    write_base(folder / "other", hidden_size=24)
    (folder / "deep").mkdir()
    write_base(folder / "deep", num_hidden_layers=3)
    (folder / "torn.safetensors").write_bytes((folder / "out" / "masks.safetensors").read_bytes()[:-7])
    save_file({"logits.x": torch.zeros(2)}, folder / "foreign.safetensors")
    for model, masks, words in (
        ("other/model", "out", "a mask of 32 units for backbone.layers.0.mixer, which has 48 in the model"),
        ("deep/model", "out", "masks of 2 blocks (backbone.layers.0.mixer [32]"),
        ("out", "out", "a mask of 32 units for backbone.layers.0.mixer, which has"),
        ("model", "bare", "bare: no masks.safetensors in it"),
        ("model", "none", "none: no such file"),
        ("model", "torn.safetensors", "torn.safetensors: no whole safetensors file"),
        ("model", "foreign.safetensors", "foreign.safetensors: holds no learned masks"),
        ("model", "model/model.safetensors", "model.safetensors: holds no learned masks"),
    ):
        code, lines = mamba("shrink", model, "--text", "text.txt", "--masks", masks, "--output", "cut")
        assert code == 2, lines
        assert words in next(line for line in lines if line.startswith("error")), (model, masks)
        assert not (folder / "cut").exists()

"""Channel order, masks and shrinking of Mamba-2 layers beside attention; the pure models' tests have the rest."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.channels import channel_groups, state_groups, unknown_mixers
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.selection import select_kept
from monkeyjump.mamba.shrink import load_shrunk, shrink
from tiny import tokens
from tiny_mamba import batches, hybrid

EIGHT = {  # heads of 4 channels, in 2 groups
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 4},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 4},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 4},
}
every = pytest.mark.parametrize("kind", EIGHT)
either = pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])


def make(kind: str, patched: bool = False) -> nn.Module:
    model = hybrid(kind, **EIGHT[kind])
    return patch_mamba(model) if patched else model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length=12)).logits


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@every
def test_every_mixer_is_known_by_its_heads(kind: str) -> None:
    heads = [group for group in channel_groups(make(kind)).values() if group.kind == "head"]
    assert len(heads) == (3 if kind == "zamba2" else 1)
    assert all((group.units, group.width, group.sections) == (8, 4, 2) for group in heads)
    assert unknown_mixers(make(kind)) == {}


@every
@either
def test_a_folded_order_changes_no_logit(kind: str, patched: bool) -> None:
    model = make(kind, patched)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    order = ChannelOrder("importance")
    order.update(model, batches())
    assert_near(logits(model), before)
    for name, group in channel_groups(model).items():
        if group.kind == "head":
            moved = f"{name}.in_proj.weight"
            assert not torch.equal(model.state_dict()[moved], weights[moved])


@every
@either
@pytest.mark.parametrize("states", [False, True], ids=["channels", "states"])
def test_a_shrunk_model_gives_what_the_masked_one_gives(kind: str, patched: bool, states: bool) -> None:
    model = make(kind, patched)
    masks = attach_masks(model, MaskConfig(target_sparsity=0.45, states=states))
    for number, gate in enumerate(masks.gates.values()):
        gate.logits.data = torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(number))
    masks.target = 0.45
    masked, kept = logits(model), masks.kept()
    masks.remove()
    whole, small = logits(model), logits(shrink(model, kept))
    assert_near(small, masked)
    assert (small - whole).abs().max() > 1e-3


@every
def test_shrunk_models_save_load_and_generate(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    groups = {**channel_groups(model), **state_groups(model)}
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.randn(group.units, generator=generator) for name, group in groups.items()}
    shrink(model, select_kept(groups, scores, 0.5))
    model.save_pretrained(tmp_path)
    loaded = load_shrunk(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    ids = tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    plain = loaded.generate(ids, use_cache=False, **options)
    assert torch.equal(loaded.generate(ids, **options), plain)
    assert torch.equal(patch_mamba(loaded).generate(ids, **options), plain)


@pytest.mark.parametrize(("kind", "mixer"), [("zamba", "ZambaMambaMixer"), ("falcon_h1", "FalconH1Mixer")])
def test_mixers_whose_channels_stay_are_named(kind: str, mixer: str) -> None:
    for model in (hybrid(kind), patch_mamba(hybrid(kind))):
        assert unknown_mixers(model) == {mixer: 3 if kind == "zamba" else 2}

"""Shrunk models: equal to the masked ones, really smaller, saved, loaded and generating as any model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.channels import channel_groups, state_groups
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.selection import select_kept
from monkeyjump.mamba.shrink import load_shrunk, repair, shrink
from tiny import left_padded, tokens
from tiny_mamba import MODELS, batches, mamba, mamba2, plain_llama

PATCHABLE = ("mamba", "mamba2", "falcon_mamba")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length=12)).logits


def random_kept(model: nn.Module, sparsity: float = 0.5, seed: int = 3, states: bool = False) -> dict[str, Tensor]:
    """Another number of units in every block."""
    groups = {**channel_groups(model), **(state_groups(model) if states else {})}
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(group.units, generator=generator) for name, group in groups.items()}
    return select_kept(groups, scores, sparsity)


CASES = [
    pytest.param(name, states, patched, id=f"{name}{'-states' * states}{'-patched' * patched}")
    for name in MODELS
    for states in ((False, True) if name in ("mamba", "mamba2") else (False,))
    for patched in ((False, True) if name in PATCHABLE else (False,))
]


@pytest.mark.parametrize(("name", "states", "patched"), CASES)
def test_a_shrunk_model_gives_what_the_masked_one_gives(name: str, states: bool, patched: bool) -> None:
    model = MODELS[name]()
    if patched:
        patch_mamba(model)
    masks = attach_masks(model, MaskConfig(target_sparsity=0.45, states=states))
    for number, gate in enumerate(masks.gates.values()):
        gate.logits.data = torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(number))
    masks.target = 0.45
    masked, kept = logits(model), masks.kept()
    assert len({len(units) for units in kept.values()}) > 1 or name == "mamba2"
    masks.remove()
    whole = logits(model)
    small = logits(shrink(model, kept))
    tolerance = 1e-5 * max(1.0, masked.abs().max().item())
    assert (small - masked).abs().max() <= tolerance
    assert (small - whole).abs().max() > 100 * tolerance


def test_the_norm_of_mamba2_follows_when_half_the_channels_go() -> None:
    """Small activations, so that eps counts: in float64 and to 1e-12, against a mean over all channels."""
    norm = mamba2().backbone.layers[0].mixer.norm
    torch.manual_seed(0)
    x = 1e-3 * torch.randn(3, 2, 4, 4, dtype=torch.float64)  # [tokens, groups, heads, channels]
    x[:, :, 2:] = 0
    full = x / (x.pow(2).mean((2, 3), keepdim=True) + norm.variance_epsilon).sqrt()
    part = x[:, :, :2]
    scaled = 2**0.5 * part / (part.pow(2).mean((2, 3), keepdim=True) + 2 * norm.variance_epsilon).sqrt()
    torch.testing.assert_close(full[:, :, :2], scaled, rtol=1e-12, atol=0)
    model = mamba2()
    before = model.backbone.layers[0].mixer.norm.weight.clone()
    shrink(model, {"backbone.layers.0.mixer": torch.tensor([0, 1, 4, 5])})
    mixer = model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.norm.weight, before.view(8, 4)[[0, 1, 4, 5]].flatten() * 2**0.5)
    assert mixer.norm.variance_epsilon == pytest.approx(2 * norm.variance_epsilon)
    assert (mixer.norm.group_size, mixer.num_heads, mixer.intermediate_size, mixer.conv_dim) == (8, 4, 16, 32)


def test_the_count_of_parameters_is_exact() -> None:
    model = mamba()
    before = sum(parameter.numel() for parameter in model.parameters())
    per_channel = 2 * 16 + (4 + 1) + (3 + 2 * 4) + (3 + 1) + (4 + 1) + 16  # in, conv, x, dt, A and D, out
    kept = random_kept(model)
    shrink(model, kept)
    gone = 64 - sum(len(units) for units in kept.values())
    assert gone == 32
    assert sum(parameter.numel() for parameter in model.parameters()) == before - gone * per_channel
    shrink(model, {f"backbone.layers.{layer}.mixer:states": torch.tensor([0, 3]) for layer in (0, 1)})
    widths = [layer.mixer.A_log.shape for layer in model.backbone.layers]
    assert [tuple(width) for width in widths] == [(len(units), 2) for units in kept.values()]
    llama_model = plain_llama()
    before = sum(parameter.numel() for parameter in llama_model.parameters())
    shrink(llama_model, {"model.layers.1.mlp": torch.arange(10)})
    assert sum(parameter.numel() for parameter in llama_model.parameters()) == before - 38 * 3 * 32


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_models_save_load_and_generate(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    shrink(model, random_kept(model, states=name in ("mamba", "mamba2")))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = load_shrunk(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), expected)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = tokens(2, 5)
    cached = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = loaded.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert torch.equal(cached, plain)
    if name in PATCHABLE:
        assert torch.equal(patch_mamba(loaded).generate(ids, attention_mask=torch.ones_like(ids), **options), plain)


def test_a_shrunk_model_shrinks_again_and_in_half_precision(tmp_path: Path) -> None:
    model = mamba2().bfloat16()
    shrink(model, random_kept(model, 0.25))
    shrink(model, random_kept(model, 0.25))
    model.save_pretrained(tmp_path)
    loaded = load_shrunk(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    for first, second in zip(model.backbone.layers, loaded.backbone.layers):
        assert second.mixer.norm.variance_epsilon == pytest.approx(first.mixer.norm.variance_epsilon)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)  # why load_shrunk exists


def test_a_shrunk_model_trains() -> None:
    model = mamba()
    model.backbone.layers[0].mixer.A_log.requires_grad_(False)
    shrink(model, random_kept(model))
    assert not model.backbone.layers[0].mixer.A_log.requires_grad
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**batches(1)[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_blocks_after_an_order_are_the_first_units() -> None:
    model = mamba()
    ChannelOrder("importance").update(model, batches())
    groups = channel_groups(model)
    positions = {name: -torch.arange(32.0) for name in groups}
    kept = select_kept(groups, positions, 0.5, block=8, scope="layer")
    assert all(units.tolist() == list(range(16)) for units in kept.values())
    shrink(model, kept)
    assert logits(model).isfinite().all()


# ---- repair


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_repair_brings_the_hidden_states_closer(name: str, one_by_one: bool) -> None:
    dense = MODELS[name]()
    small = shrink(copy.deepcopy(dense), random_kept(dense))
    wanted, before = logits(dense), logits(small)
    data = [{"input_ids": tokens(4, 24, seed)} for seed in range(6)]
    repair(small, dense, data, one_by_one=one_by_one)
    assert (logits(small) - wanted).norm() < 0.95 * (before - wanted).norm()


def test_the_repair_is_the_least_squares_solution_and_whole_blocks_stay() -> None:
    dense = mamba()
    small = shrink(copy.deepcopy(dense), {"backbone.layers.0.mixer": torch.arange(0, 32, 2)})
    second = small.backbone.layers[1].mixer.out_proj.weight.clone()
    batch = {"input_ids": tokens(4, 24)}
    seen: dict[str, Tensor] = {}
    small.backbone.layers[0].mixer.out_proj.register_forward_pre_hook(lambda m, i: seen.update(x=i[0].flatten(0, 1)))
    dense.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda m, i, o: seen.update(y=o.flatten(0, 1)))
    repair(small, dense, [batch], ridge=0)
    expected = torch.linalg.lstsq(seen["x"].double(), seen["y"].double()).solution.T
    torch.testing.assert_close(small.backbone.layers[0].mixer.out_proj.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(small.backbone.layers[1].mixer.out_proj.weight, second)


# ---- refusals


def test_what_cannot_shrink_is_refused_before_anything_has(tmp_path: Path) -> None:
    model = mamba()
    first, second = (f"backbone.layers.{layer}.mixer" for layer in (0, 1))
    good = torch.arange(5)

    def refused(keep: dict[str, Any], text: str, of: nn.Module = model) -> None:
        shapes = {name: parameter.shape for name, parameter in of.named_parameters()}
        with pytest.raises(ValueError, match=text):
            shrink(of, keep)
        assert shapes == {name: parameter.shape for name, parameter in of.named_parameters()}

    refused({first: good, "backbone.layers.1.mixr": good}, "did you mean 'backbone.layers.1.mixer'")
    for bad in (good.flip(0), torch.tensor([31, 32]), torch.tensor([-1, 2]), good[:0], good.float(), good * 0):
        refused({first: good, second: bad}, "must be ascending int64 units between 0 and 31")
    refused({first: torch.tensor([0, 1, 4])}, r"leaves \[2, 1\] heads in its 2 groups", mamba2())
    masks = attach_masks(model, MaskConfig())
    refused({first: good}, r"conv1d.weight carries GatedRows: remove the masks \(LearnedMasks.remove\)")
    masks.remove()
    adapted = get_peft_model(plain_llama(), LoraConfig(r=2, target_modules=["down_proj"])).base_model.model
    refused({"model.layers.0.mlp": good}, "mlp.down_proj carries an adapter", adapted)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    with pytest.raises(ValueError, match="holds no shrunk model"):
        load_shrunk(whole)
    shrink(model, {first: good}).save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    for widths, text in (
        ({first: 99}, "a block of 32 units"),
        ({first: 0}, "a block of 32 units"),
        ({"layer": 3}, "none of this model's"),
        (7, "not a wid"),
    ):
        config["monkeyjump_widths"] = widths
        (tmp_path / "small" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=text):
            load_shrunk(tmp_path / "small")
    with pytest.raises(ValueError, match="batches is empty"):
        repair(model, mamba(), [])
    with pytest.raises(ValueError, match=r"ridge=-0.1 must be 0 or more"):
        repair(model, mamba(), batches(1), ridge=-0.1)


# ---- one number at a time


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_biases_of_projections_are_cut_too(make: Any, tmp_path: Path) -> None:
    for changes in ({"use_conv_bias": False}, {"use_bias": True}):
        model = make(**changes)
        masks = attach_masks(model, MaskConfig(target_sparsity=0.4))
        for seed, gate in enumerate(masks.gates.values()):
            gate.logits.data = torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(seed))
        masks.target = 0.4
        masked, kept = logits(model), masks.kept()
        masks.remove()
        torch.testing.assert_close(logits(shrink(model, kept)), masked, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_shrunk(tmp_path)), logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_modules_say_the_shapes_of_their_weights(name: str) -> None:
    """What adapters are made from."""
    model = MODELS[name]()
    shrink(model, random_kept(model, states=name in ("mamba", "mamba2")))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, path
        if isinstance(module, nn.Conv1d):
            assert {module.in_channels, module.out_channels, module.groups} == {len(module.weight)}, path
    for name, group in channel_groups(model).items():
        assert group.block.intermediate_size == group.units * group.width, name


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_patched_mixers_read_all_widths_off_the_weights(make: Any) -> None:
    """Without the numbers that shrinking writes down beside them, and with a narrower projection of the step."""
    model = patch_mamba(make())
    shrink(model, random_kept(model, states=True))
    expected, stock = logits(model), make().backbone.layers[0].mixer
    for layer in model.backbone.layers:
        for field in ("intermediate_size", "num_heads", "conv_dim", "time_step_rank", "ssm_state_size"):
            if hasattr(stock, field) and (make, field) != (mamba2, "ssm_state_size"):
                setattr(layer.mixer, field, getattr(stock, field))
    assert torch.equal(logits(model), expected)
    if make is mamba:
        with torch.no_grad():
            for layer in model.backbone.layers:
                layer.mixer.dt_proj.weight[:, 2] = 0
        expected = logits(model)
        for layer in model.backbone.layers:
            mixer = layer.mixer
            rows = [row for row in range(len(mixer.x_proj.weight)) if row != 2]
            mixer.x_proj.weight = nn.Parameter(mixer.x_proj.weight[rows].detach())
            mixer.dt_proj.weight = nn.Parameter(mixer.dt_proj.weight[:, :2].detach())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)


def test_widths_of_one_block_after_the_other_are_kept_and_options_reach_hugging_face(tmp_path: Path) -> None:
    model = mamba2()
    for layer, units in ((0, [0, 4]), (1, [1, 2, 5, 6])):
        shrink(model, {f"backbone.layers.{layer}.mixer": torch.tensor(units)})
    model.save_pretrained(tmp_path)
    loaded = load_shrunk(tmp_path, dtype=torch.float64)
    assert [len(layer.mixer.A_log) for layer in loaded.backbone.layers] == [2, 4]
    assert loaded.dtype == torch.float64
    assert not loaded.training
    config = json.loads((tmp_path / "config.json").read_text())
    for change, text in (
        ({"monkeyjump_widths": {"backbone.layers.0.mixer": 3}}, "a block of 8 units"),
        ({"architectures": ["Mamba3ForCausalLM"]}, "architectures='Mamba3ForCausalLM' is not known"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=text):
            load_shrunk(tmp_path)


def test_weights_of_whole_numbers_do_not_shrink() -> None:
    model = mamba()
    mixer = model.backbone.layers[0].mixer
    mixer.dt_proj.weight = nn.Parameter((10 * mixer.dt_proj.weight.detach()).to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"dt_proj.weight is a Tensor of torch.int8: shrink a whole one"):
        shrink(model, random_kept(mamba()))


def read_and_given(model: nn.Module, layer: int, data: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What out_proj reads and gives over all tokens that are no padding."""
    seen: list[tuple[Tensor, Tensor]] = []
    reader = model.backbone.layers[layer].mixer.out_proj
    hook = reader.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    kept = [batch["attention_mask"].bool() for batch in data]
    x, y = ([pair[side][mask] for pair, mask in zip(seen, kept)] for side in (0, 1))
    return torch.cat(x).double(), torch.cat(y).double()


def ridge_solution(reader: nn.Linear, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """argmin of mean |W x + b - y|^2 + ridge mean(x^2) |W - W0|^2, by least squares on stacked rows."""
    strength = (ridge * len(x) * x.square().mean()).sqrt()
    rows = torch.cat([x, strength * torch.eye(x.shape[1]).double()])
    wanted = torch.cat([y - reader.bias.detach().double(), strength * reader.weight.detach().double().T])
    return torch.linalg.lstsq(rows, wanted).solution.T


@pytest.mark.parametrize("one_by_one", [True, False])
def test_the_repair_minimizes_what_it_says(one_by_one: bool) -> None:
    """With a bias, padding and two batches; the second block reads what the repaired first one gives, or does not."""
    dense = mamba(use_bias=True)
    small = shrink(copy.deepcopy(dense), random_kept(dense))
    data = [left_padded([tokens(1, 30, seed), tokens(1, 14, seed + 1)]) for seed in (1, 3)]
    wanted = [read_and_given(dense, layer, data)[1] for layer in (0, 1)]
    expected, twin = [], copy.deepcopy(small)
    for layer in (0, 1):
        reader = twin.backbone.layers[layer].mixer.out_proj
        x, _ = read_and_given(twin, layer, data)
        expected.append(ridge_solution(reader, x, wanted[layer], ridge=0.3))
        if one_by_one:
            reader.weight.data = expected[-1].float()
    small.train()
    repair(small, dense, data, ridge=0.3, one_by_one=one_by_one)
    for layer, weight in enumerate(expected):
        reader = small.backbone.layers[layer].mixer.out_proj
        torch.testing.assert_close(reader.weight.double(), weight, rtol=1e-3, atol=1e-5)
        assert not reader._forward_pre_hooks
        assert not dense.backbone.layers[layer].mixer.out_proj._forward_hooks
    assert small.training


def test_padding_is_nothing_to_repair_by() -> None:
    dense, rows = plain_llama(), [tokens(1, 40, 1), tokens(1, 23, 2)]
    padded, alone = (shrink(copy.deepcopy(dense), random_kept(dense)) for _ in range(2))
    repair(padded, dense, [left_padded(rows)], ridge=0.1)
    repair(alone, dense, [{"input_ids": row} for row in rows], ridge=0.1)
    for first, second in zip(padded.model.layers, alone.model.layers):
        torch.testing.assert_close(first.mlp.down_proj.weight, second.mlp.down_proj.weight, rtol=1e-3, atol=1e-4)


def test_channels_that_never_fire_keep_their_weight() -> None:
    dense = mamba()
    small = shrink(copy.deepcopy(dense), {"backbone.layers.0.mixer": torch.arange(16)})
    mixer = small.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.conv1d.weight[3] = 0
        mixer.conv1d.bias[3] = 0
    before = mixer.out_proj.weight.detach().clone()
    repair(small, dense, batches(), ridge=0)
    torch.testing.assert_close(mixer.out_proj.weight[:, 3], before[:, 3])
    assert not torch.equal(mixer.out_proj.weight, before)

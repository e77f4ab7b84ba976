"""Orders of the inner channels: what they measure, and that folding them in changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from monkeyjump.allocation.parametrization import put_ia3, put_lora
from monkeyjump.mamba.channel_group import section_of
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups, state_groups
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder, OrderUpdate, fold, inverse
from monkeyjump.mamba.order.statistics import Moments, collect_moments, unit_correlation
from monkeyjump.mamba.order.tour import nearest_neighbor_tour, path_cost, two_opt
from tiny import left_padded, tokens
from tiny_mamba import MODELS, batches, mamba, mamba2, plain_llama


def random_orders(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    order = ChannelOrder("random", seed=seed)
    order.update(copy.deepcopy(model))
    return order.orders


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length=12) if ids is None else ids).logits


def gated_norm_in_float64(norm: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    gated = (hidden_states * nn.functional.silu(gate)).double().unflatten(-1, (-1, norm.group_size))
    scale = torch.rsqrt(gated.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (gated * scale).flatten(-2)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_a_folded_order_changes_no_logit(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is torch.float64:  # Mamba-2's norm takes its mean over the channels in float32, whatever the model's dtype
        monkeypatch.setattr(MambaRMSNormGated, "forward", gated_norm_in_float64)
    model = MODELS[name]().to(dtype)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    fold(model, random_orders(model))
    after = logits(model)
    assert (after - before).abs().max() <= tolerance * max(1.0, before.abs().max().item())
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_every_channel_moves_and_the_inverse_moves_it_back(name: str) -> None:
    model = MODELS[name]()
    before, orders = copy.deepcopy(model.state_dict()), random_orders(model)
    fold(model, orders)
    for group in channel_groups(model).values():
        for owner, field, axis in {(place.owner, place.name, place.axis) for place in group.places}:
            key = ".".join(filter(None, (group.name, owner, field)))
            assert not torch.equal(model.state_dict()[key], before[key]), (key, axis)
    fold(model, {block: inverse(order) for block, order in orders.items()})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_independent_permutation_of_mamba_gives_the_same_weights() -> None:
    model, order = mamba(), torch.randperm(32, generator=torch.Generator().manual_seed(1))
    mixer, name = model.backbone.layers[1].mixer, "backbone.layers.1.mixer"
    rows = torch.cat([order, 32 + order])
    expected = {
        "in_proj.weight": mixer.in_proj.weight[rows],
        "conv1d.weight": mixer.conv1d.weight[order],
        "conv1d.bias": mixer.conv1d.bias[order],
        "x_proj.weight": mixer.x_proj.weight[:, order],
        "dt_proj.weight": mixer.dt_proj.weight[order],
        "dt_proj.bias": mixer.dt_proj.bias[order],
        "A_log": mixer.A_log[order],
        "D": mixer.D[order],
        "out_proj.weight": mixer.out_proj.weight[:, order],
    }
    expected = {key: value.detach().clone() for key, value in expected.items()}
    fold(model, {name: order})
    assert all(torch.equal(mixer.state_dict()[key], value) for key, value in expected.items())
    assert expected.keys() == mixer.state_dict().keys()  # nothing of the mixer was left out


def adamw_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int) -> None:
    model.train()
    for step in range(first, first + steps):
        ids = tokens(length=8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "llama"])
def test_training_goes_on_as_if_nothing_had_been_folded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MambaRMSNormGated, "forward", gated_norm_in_float64)
    plain, folded = (MODELS[name]().double() for _ in range(2))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4) for model in (plain, folded)]
    for model, optimizer in zip((plain, folded), optimizers):
        adamw_steps(model, optimizer, 3, first=0)
    orders = random_orders(folded)
    fold(folded, orders, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers):
        adamw_steps(model, optimizer, 4, first=3)
    fold(folded, {block: inverse(order) for block, order in orders.items()}, optimizers[1])
    for (key, expected), found in zip(plain.named_parameters(), folded.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7, msg=key)
        for moment in ("exp_avg", "exp_avg_sq"):
            states = (optimizers[1].state[found][moment], optimizers[0].state[expected][moment])
            torch.testing.assert_close(*states, rtol=1e-6, atol=1e-8, msg=f"{moment} of {key}")


def test_gradients_that_wait_for_the_step_move_along() -> None:
    model = mamba()
    model(**batches()[0]).loss.backward()
    mixer, order = model.backbone.layers[0].mixer, torch.arange(31, -1, -1)
    expected = mixer.A_log.grad.flip(0).clone()
    fold(model, {"backbone.layers.0.mixer": order})
    assert torch.equal(mixer.A_log.grad, expected)


@pytest.mark.parametrize("config", [LoraConfig(r=2, init_lora_weights=False), IA3Config(init_ia3_weights=False)])
def test_adapters_on_the_folded_projections_move_along(config: Any) -> None:
    config.target_modules = ["gate_proj", "up_proj", "down_proj"]
    if isinstance(config, IA3Config):
        config.feedforward_modules = ["down_proj"]
    torch.manual_seed(2)
    model = get_peft_model(plain_llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "ia3" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    before = logits(model)
    fold(model, random_orders(model))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_allocated_adapters_move_along_with_their_moments() -> None:
    plain, folded = (mamba().double() for _ in range(2))
    for model in (plain, folded):
        model.requires_grad_(False)
        for number, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d)):
            torch.manual_seed(number)
            if module is not model.lm_head:
                put_ia3(module) if number % 3 == 2 else put_lora(module, rank=2, scale=0.5)
        model.double()
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (plain, folded)]
    for step in range(2):
        for model, optimizer in zip((plain, folded), optimizers):
            adamw_steps(model, optimizer, 3, first=3 * step)
        if step == 0:
            before = logits(folded)
            orders = random_orders(folded)
            fold(folded, orders, optimizers[1])
            torch.testing.assert_close(logits(folded), before, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(folded), logits(plain), rtol=0, atol=1e-6)
    assert (logits(plain) - before).abs().max() > 1e-3
    fold(folded, {block: inverse(order) for block, order in orders.items()}, optimizers[1])
    for (key, expected), found in zip(plain.named_parameters(), folded.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=key)


def test_what_cannot_move_is_refused_before_anything_has() -> None:
    model = mamba()
    first, second = (f"backbone.layers.{layer}.mixer" for layer in (0, 1))
    before, order = copy.deepcopy(model.state_dict()), torch.arange(31, -1, -1)

    def refused(orders: dict[str, Tensor], text: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        with pytest.raises(ValueError, match=text):
            fold(model, orders, optimizer)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    refused({first: order, second: torch.zeros(32, dtype=torch.long)}, "no permutation of its 32 units")
    refused({first: order, "backbone.layers.1.mixr": order}, "did you mean 'backbone.layers.1.mixer'")
    adafactor = torch.optim.Adafactor(model.parameters())
    model(**batches()[0]).loss.backward()
    adafactor.step()
    before = copy.deepcopy(model.state_dict())
    refused({first: order}, "Adafactor keeps 'row_var' of shape .* use AdamW or SGD", adafactor)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.backbone.layers[1].mixer.x_proj, "weight", Doubled())
    before = copy.deepcopy(model.state_dict())
    refused({first: order, second: order}, "layers.1.mixer.x_proj.weight carries Doubled")


def test_heads_of_one_group_stay_together() -> None:
    model = mamba2()
    with pytest.raises(ValueError, match="moves heads between its 2 groups"):
        fold(model, {"backbone.layers.0.mixer": torch.arange(7, -1, -1)})
    order = ChannelOrder("importance")
    order.update(model, batches())
    for name, group in channel_groups(model).items():
        assert torch.equal(section_of(group)[order.orders[name]], section_of(group))


def test_unsupported_models_are_named() -> None:
    with pytest.raises(ValueError, match="Linear has no block whose channels are known"):
        channel_groups(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"hidden_act='sigmoid' of .* does not map 0 to 0"):
        channel_groups(mamba(hidden_act="sigmoid"))
    with pytest.raises(ValueError, match="did you mean 'correlation'"):
        ChannelOrder("corelation")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no scan whose states can go"):
        state_groups(plain_llama())
    with pytest.raises(ValueError, match="batches is empty"):
        ChannelOrder("correlation").update(mamba(), [])
    with pytest.raises(ValueError, match="gives no loss: add labels"):
        ChannelOrder("importance").update(mamba(), [{"input_ids": tokens()}])


# ---- what is measured


def test_streamed_correlation_is_that_of_numpy_and_constant_channels_give_no_nan() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6) + 3
    rows[:, 2] = 7.1
    moments = Moments(6, torch.device("cpu"))
    for piece in rows.split(11):
        moments.update(piece)
    varying = [0, 1, 3, 4, 5]
    found, expected = moments.absolute_correlation(), np.abs(np.corrcoef(rows[:, varying].double().numpy().T))
    np.testing.assert_allclose(found[varying][:, varying], expected, atol=1e-9)
    assert found[2].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("name", ["mamba", "llama"])
def test_padding_is_no_data(name: str) -> None:
    model = MODELS[name]()
    groups, rows = channel_groups(model), [tokens(1, 9, 1), tokens(1, 4, 2)]
    padded = collect_moments(model, [left_padded(rows)], groups)
    alone = collect_moments(model, [{"input_ids": row} for row in rows], groups)
    for block in groups:
        assert padded[block].count == alone[block].count == 13
        torch.testing.assert_close(padded[block].second, alone[block].second, rtol=1e-3, atol=1e-5)


def test_the_tour_finds_a_line_and_two_opt_only_shortens() -> None:
    line = np.abs(np.arange(40)[:, None] - np.arange(40)[None]) / 40
    for start, stop in ((0, 12), (10, 25), (30, 40)):  # the first, an inner and the last stretch turned round
        turned = np.concatenate([np.arange(start), np.arange(start, stop)[::-1], np.arange(stop, 40)])
        assert two_opt(turned, line, sweeps=1).tolist() == list(range(40))
    shuffled = np.random.default_rng(1).permutation(40)
    scattered = line[np.ix_(shuffled, shuffled)]
    assert path_cost(nearest_neighbor_tour(scattered), scattered) < 2 * 39 / 40  # from the middle: out, and back once
    cloud = np.random.default_rng(0).random((40, 40))
    cloud = cloud + cloud.T
    tour = nearest_neighbor_tour(cloud)
    shorter = two_opt(tour, cloud, sweeps=10)
    assert sorted(tour) == sorted(shorter) == list(range(40))
    assert path_cost(shorter, cloud) < path_cost(tour, cloud) < path_cost(np.arange(40), cloud)
    assert (np.diff([path_cost(two_opt(tour, cloud, sweeps), cloud) for sweeps in range(4)]) <= 0).all()


def test_the_correlation_order_reports_shape_and_a_lower_cost() -> None:
    model = mamba()
    order = ChannelOrder("correlation", two_opt_sweeps=5)
    order.update(model, batches())
    for block in order.blocks:
        assert block.correlation_shape == (32, 32)
        assert block.cost_after < block.cost_before
    again = ChannelOrder("correlation", two_opt_sweeps=5)
    again.update(model, batches())  # the channels lie in that order now
    assert [block.cost_before for block in again.blocks] == pytest.approx([b.cost_after for b in order.blocks])


@pytest.mark.parametrize("name", MODELS)
def test_importance_is_the_gradient_of_a_gate(name: str) -> None:
    """Central differences of the loss (float32 in all models) in a factor on a unit's rows."""
    model, batch = MODELS[name]().double(), batches(1)[0]
    groups = channel_groups(model)
    model.requires_grad_(False)
    scores = channel_importance(model, [batch], groups)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for block, group in groups.items():
        unit = int(scores[block].argmax())
        found = [_loss_with_gate(model, batch, group, unit, 1 + step) for step in (0.05, -0.05)]
        assert abs(found[0] - found[1]) / 0.1 == pytest.approx(scores[block][unit].item(), rel=5e-3, abs=1e-6)


def _loss_with_gate(model: nn.Module, batch: dict[str, Tensor], group: Any, unit: int, gate: float) -> float:
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for place in group.gated:
            start = place.start + unit * place.width
            getattr(group.block.get_submodule(place.owner), place.name)[start : start + place.width] *= gate
        loss = model(**batch).loss.item()
    model.load_state_dict(kept)
    return loss


def test_importance_puts_dead_channels_last() -> None:
    model = mamba()
    mixer, dead = model.backbone.layers[0].mixer, torch.tensor([3, 17, 18])
    with torch.no_grad():
        mixer.out_proj.weight[:, dead] = 0
        mixer.x_proj.weight[:, dead] = 0
    order = ChannelOrder()
    order.update(model, batches())
    assert sorted(order.orders["backbone.layers.0.mixer"][-3:].tolist()) == dead.tolist()
    assert not mixer.out_proj.weight[:, -3:].any()


# ---- kept over time


def test_updates_compose_and_survive_saving(tmp_path: Path) -> None:
    model, first = mamba(), mamba()
    order = ChannelOrder("random", seed=1)
    order.update(model)
    once = copy.deepcopy(order.orders)
    order.update(model)
    assert all(not torch.equal(order.orders[name], once[name]) for name in once)
    assert all(not torch.equal(order.orders[name], first_twice[first_twice]) for name, first_twice in once.items())
    fold(first, order.orders)  # the composed order, in one step
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in first.state_dict().items())
    order.save(tmp_path)
    saved, backwards = (np.load(tmp_path / f"scan_order{end}.npy", allow_pickle=False) for end in ("", "_inverse"))
    assert saved.shape == (2, 32)
    assert (np.take_along_axis(saved, backwards, 1) == np.arange(32)).all()
    loaded = ChannelOrder.load(tmp_path)
    loaded.update(model)
    order.update(model)  # from the same weights, with the same seed: the same order again
    assert all(torch.equal(loaded.orders[name], order.orders[name]) for name in once)


def test_orders_of_blocks_of_several_widths_are_padded(tmp_path: Path) -> None:
    model = MODELS["jamba"]()
    order = ChannelOrder("random")
    order.update(model)
    order.save(tmp_path)
    assert (np.load(tmp_path / "scan_order.npy") == -1).any()
    loaded = ChannelOrder.load(tmp_path)
    assert all(torch.equal(loaded.orders[name], order.orders[name]) for name in order.orders)
    np.save(tmp_path / "scan_order.npy", np.zeros((1, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="the folder is damaged"):
        ChannelOrder.load(tmp_path)


def train(model: nn.Module, folder: Path, callbacks: list[Any]) -> nn.Module:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 8)]
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-4}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 4}
    arguments = TrainingArguments(str(folder), **settings, **quiet, seed=0)
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    return model.eval()


def test_a_stock_trainer_folds_every_so_many_steps(tmp_path: Path) -> None:
    order = ChannelOrder("importance")
    plain = train(mamba(), tmp_path / "plain", [])
    update = OrderUpdate(order, batches(1), every=2)
    folded = train(mamba(), tmp_path / "folded", [update])
    assert order.updates == 2
    torch.testing.assert_close(logits(folded), logits(plain), rtol=1e-3, atol=1e-4)
    fold(folded, {name: inverse(found) for name, found in order.orders.items()})
    for (key, expected), found in zip(plain.named_parameters(), folded.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=key)
    resumed = OrderUpdate(ChannelOrder(), batches(1))
    resumed.resume(tmp_path / "folded" / "checkpoint-4")
    assert all(torch.equal(resumed.order.orders[name], order.orders[name]) for name in order.orders)
    with pytest.raises(ValueError, match="scan_update_frequency=0 must be at least 1"):
        OrderUpdate(order, [], every=0)


# ---- one number at a time


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_biases_of_projections_move_along(make: Any) -> None:
    """Models with `use_bias`, and without the convolution's."""
    for changes in ({"use_bias": True}, {"use_conv_bias": False}):
        model = make(**changes)
        before = logits(model)
        fold(model, random_orders(model))
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def reader_input(model: nn.Module, group: Any, batch: dict[str, Tensor]) -> np.ndarray:
    """What out_proj of a block reads, `[tokens, D]`."""
    seen: list[Tensor] = []
    hook = group.block.get_submodule(group.reader).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits(model, batch["input_ids"])
    hook.remove()
    return seen[0].flatten(0, 1).double().numpy()


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_the_reported_cost_is_that_of_the_neighbors_correlations(make: Any) -> None:
    """Correlations by numpy; those of heads are means over the pairs of their channels."""
    batch, after = batches(1, 40)[0], []
    for sweeps in (0, 4):
        model = make()
        groups, order = channel_groups(model), ChannelOrder("correlation", two_opt_sweeps=sweeps)
        before = {name: reader_input(model, group, batch) for name, group in groups.items()}
        order.update(model, [batch])
        for block in order.blocks:
            group, found = groups[block.block], []
            for rows in (before[block.block], reader_input(model, group, batch)):
                rho = np.abs(np.corrcoef(rows.T)).reshape(group.units, group.width, group.units, group.width)
                found.append(sum(1 - rho.mean((1, 3))[i, i + 1] for i in range(group.units - 1)))
            assert (block.cost_before, block.cost_after) == pytest.approx(found, rel=1e-3)
            assert torch.equal(section_of(group)[order.orders[block.block]], section_of(group))
        after.append(sum(block.cost_after for block in order.blocks))
    assert after[1] < after[0] or make is mamba2  # four heads of a group are too few for 2-opt to shorten


def test_correlation_of_units_is_the_mean_over_pairs_of_channels() -> None:
    rho = torch.tensor([[1.0, 0.2, 0.4, 0.6], [0.2, 1.0, 0.0, 0.8], [0.4, 0.0, 1.0, 0.5], [0.6, 0.8, 0.5, 1.0]])
    torch.testing.assert_close(unit_correlation(rho, 2), torch.tensor([[1.0, 0.45], [0.45, 1.0]]))


def test_a_small_spread_around_a_large_mean_is_no_constant() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double()
    rows[:, 1] = 1000 - rows[:, 0]
    moments = Moments(3, torch.device("cpu"))
    moments.update(rows)
    assert moments.absolute_correlation()[0, 1].item() == pytest.approx(1, abs=1e-6)


def test_tours_by_hand() -> None:
    star = np.full((4, 4), 1.0) - np.eye(4)
    star[2] = star[:, 2] = [0.5, 0.3, 0.0, 0.4]  # 2 is close to all others
    assert nearest_neighbor_tour(star).tolist() == [2, 1, 0, 3]
    assert path_cost(np.array([2, 1, 0, 3]), star) == pytest.approx(0.3 + 1 + 1)
    cloud = np.random.default_rng(0).random((40, 40))
    cloud = cloud + cloud.T
    lengths = [path_cost(two_opt(np.arange(40), cloud, sweeps), cloud) for sweeps in (1, 2, 10)]
    assert lengths[0] > lengths[1] > lengths[2]


def test_measurements_see_the_model_as_in_evaluation_and_leave_it_as_it_was() -> None:
    model = mamba().train()
    model.backbone.layers[1].eval()
    attach_masks(model, MaskConfig(initial_logit=0.0))  # in training mode half of the channels would be off
    groups, modes = channel_groups(model), [module.training for module in model.modules()]
    found = collect_moments(model, batches(1), groups), channel_importance(model, batches(1), groups)
    assert modes == [module.training for module in model.modules()]
    assert not any(group.block.out_proj._forward_pre_hooks for group in groups.values())
    model.eval()
    expected = collect_moments(model, batches(1), groups), channel_importance(model, batches(1), groups)
    for name in groups:
        assert torch.equal(found[0][name].second, expected[0][name].second)
        assert torch.equal(found[1][name], expected[1][name])


def test_importance_adds_up_absolute_values_of_batches_whatever_the_callers_mode() -> None:
    model = mamba()
    groups, data = channel_groups(model), batches(3)
    each = [channel_importance(model, [batch], groups) for batch in data]
    with torch.no_grad():
        together = channel_importance(model, data, groups)
    for name in groups:
        torch.testing.assert_close(together[name], sum(one[name] for one in each))
        assert (each[0][name] >= 0).all()


@pytest.mark.parametrize("kind", ["peft", "allocated"])
def test_importance_of_adapted_channels_is_that_of_the_merged_weights(kind: str) -> None:
    torch.manual_seed(3)
    if kind == "peft":
        model: Any = get_peft_model(plain_llama(), LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    else:
        model = mamba()
        conv = model.backbone.layers[0].mixer.conv1d
        put_lora(conv, rank=2, scale=1.0)
        nn.init.normal_(conv.parametrizations.weight[0].lora_B)
    found = channel_importance(model, batches(1), channel_groups(model))
    if kind == "peft":
        model = model.merge_and_unload()
    else:
        parametrize.remove_parametrizations(conv, "weight")
    expected = channel_importance(model, batches(1), channel_groups(model))
    for one, other in zip(found.values(), expected.values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LoraConfig(lora_bias=True), "lora_bias=True on .*up_proj is not moved with the channels"),
        (LoraConfig(use_dora=True), "up_proj carries Linear, which does not follow"),
        (LoHaConfig(), "up_proj carries Linear, which does not follow an order of the channels: merge or unload"),
    ],
)
def test_adapters_that_would_stay_behind_are_refused(config: Any, text: str) -> None:
    config.target_modules = ["up_proj"]
    model = get_peft_model(plain_llama(mlp_bias=True), config)
    orders = {name: torch.arange(group.units).flip(0) for name, group in channel_groups(model).items()}
    with pytest.raises(ValueError, match=text):
        fold(model, orders)


def test_weights_of_whole_numbers_are_refused() -> None:
    model = mamba()
    whole = (10 * model.backbone.layers[0].mixer.dt_proj.weight.detach()).to(torch.int8)
    model.backbone.layers[0].mixer.dt_proj.weight = nn.Parameter(whole, requires_grad=False)
    with pytest.raises(ValueError, match=r"dt_proj.weight is a Tensor of torch.int8: .* unquantized model"):
        fold(model, random_orders(mamba()))


def test_methods_seeds_and_settings_are_kept(tmp_path: Path) -> None:
    model = MODELS["jamba"]()
    identity = ChannelOrder("identity")
    identity.update(model)
    assert all(torch.equal(order, torch.arange(len(order))) for order in identity.orders.values())
    mixers = ChannelOrder("random", seed=1, two_opt_sweeps=3, mlps=False)
    mixers.update(model)
    assert list(mixers.orders) == ["model.layers.0.mamba"]
    other = random_orders(MODELS["jamba"](), seed=2)["model.layers.0.mamba"]
    assert not torch.equal(mixers.orders["model.layers.0.mamba"], other)
    mixers.save(tmp_path)
    loaded = ChannelOrder.load(tmp_path)
    for name in ("method", "seed", "two_opt_sweeps", "mlps", "updates", "seconds"):
        assert getattr(loaded, name) == getattr(mixers, name), name
    OrderUpdate(mixers, []).on_save(
        SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(is_world_process_zero=False, global_step=7), None
    )
    assert not (tmp_path / "checkpoint-7").exists()

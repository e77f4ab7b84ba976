"""Learned masks: what is sampled, the budget, the exact export, and that gates close channels exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Trainer, TrainingArguments

from monkeyjump.allocation.parametrization import put_lora
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups, state_groups
from monkeyjump.mamba.masks import MaskConfig, MaskUpdate, attach_masks
from monkeyjump.mamba.masks.gates import logistic_noise, open_probability, relaxed_gate
from monkeyjump.mamba.order import ChannelOrder
from monkeyjump.mamba.selection import select_kept
from tiny import tokens
from tiny_mamba import MODELS, batches, jamba, mamba, mamba2, plain_llama

DRAWS = 200_000
ZERO_DRAWN = 12  # a seed whose first 2**20 uniform numbers hold a 0


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(length=12)).logits


# ---- sampling


@pytest.mark.parametrize("logit", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("relaxation", ["logistic", "hard_concrete"])
def test_a_gate_is_open_with_the_probability_that_its_logit_says(logit: float, relaxation: str) -> None:
    noise = logistic_noise((DRAWS,), torch.Generator().manual_seed(0))
    gate = relaxed_gate(torch.full((DRAWS,), logit), noise, relaxation, 0.4)
    above = gate > (0.5 if relaxation == "logistic" else 0)
    expected = open_probability(torch.tensor(logit), relaxation, 0.4).item()
    assert above.float().mean().item() == pytest.approx(expected, abs=5e-3)
    if relaxation == "logistic":
        assert expected == pytest.approx(torch.sigmoid(torch.tensor(logit)).item())
    else:
        assert (gate == 0).any()
        assert (gate == 1).any()


def test_one_gumbel_is_a_biased_gate() -> None:
    """The README's noise, for comparison: at logit 0 it opens 1 - 1/e of the gates."""
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0))
    gumbel = -(-uniform.log()).log()
    assert (torch.sigmoid(gumbel / 0.5) > 0.5).float().mean().item() == pytest.approx(0.632, abs=5e-3)


def test_noise_is_the_same_for_all_who_name_seed_and_step() -> None:
    first, second, other = (attach_masks(mamba(), MaskConfig(seed=seed)) for seed in (4, 4, 5))
    for masks in (first, second, other):
        masks.advance(17, 100)
    noise = [torch.cat([gate.noise for gate in masks.gates.values()]) for masks in (first, second, other)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])
    second.advance(18, 100)
    assert not torch.equal(noise[0], torch.cat([gate.noise for gate in second.gates.values()]))


def test_straight_through_is_hard_forward_and_relaxed_backward() -> None:
    gradients = []
    for straight_through in (False, True):
        masks = attach_masks(mamba().train(), MaskConfig(straight_through=straight_through, initial_logit=0.0))
        gate = next(iter(masks.gates.values()))
        values = gate()
        assert (set(values.unique().tolist()) == {0.0, 1.0}) == straight_through
        gradients.append(torch.autograd.grad(values.sum(), gate.logits)[0])
    torch.testing.assert_close(*gradients)


# ---- gates on a model


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_gate_removes_its_channels_exactly(name: str) -> None:
    """Whatever stands in the weights of closed channels has no effect, and nothing of them comes out."""
    model = MODELS[name]()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5))
    for gate in masks.gates.values():
        gate.logits.data = torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(1))
    masks.target = 0.5
    before = logits(model)
    assert not torch.allclose(before, logits(MODELS[name]()), atol=1e-3)
    with torch.no_grad():
        for block, group in masks.groups.items():
            closed = torch.ones(group.units).scatter_(0, masks.kept()[block], 0).bool().repeat_interleave(group.width)
            assert closed.any()
            group.block.get_submodule(group.reader).weight[:, closed] = 1e3
            if group.kind == "channel":
                group.block.x_proj.weight[:, closed] = 1e3
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_closed_state_gate_silences_the_state(name: str) -> None:
    model = MODELS[name]()
    masks = attach_masks(model, MaskConfig(states=True, target_sparsity=0.2))
    gates = {block: gate for block, gate in masks.gates.items() if block.endswith(":states")}
    for gate in gates.values():
        gate.logits.data[1] = -5
    masks.target = 2 / sum(len(gate.logits) for gate in masks.gates.values())
    before = logits(model)
    assert all(gate.kept.tolist() == [True, False, True, True] for gate in gates.values())
    with torch.no_grad():
        for group in masks.groups.values():
            if group.kind == "state" and name == "mamba":
                group.block.x_proj.parametrizations.weight.original[3 + 1] += 9  # its B
            if group.kind == "state" and name == "mamba2":
                group.block.conv1d.parametrizations.weight.original[32 + 1] += 9
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["channel", "element"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_and_gates_get_gradients_and_open_gates_change_nothing(name: str, kind: str) -> None:
    model = MODELS[name]()
    plain = logits(model)
    masks = attach_masks(model, MaskConfig(kind=kind))
    torch.testing.assert_close(logits(model), plain)  # the target starts at 0: all are kept
    model.train()
    model(**batches()[0]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    projections = {"mamba": 10, "falcon_mamba": 10, "mamba2": 6, "llama": 6, "jamba": 5 + 6}
    assert len(masks.gates) == (projections[name] if kind == "element" else 2 + (name == "jamba"))


def test_weight_and_bias_see_the_same_sample_and_eval_sees_none() -> None:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig())
    conv = model.backbone.layers[0].mixer.conv1d
    ratio = conv.weight / conv.parametrizations.weight.original
    torch.testing.assert_close(ratio[:, 0, 0], conv.bias / conv.parametrizations.bias.original)
    assert ratio.std() > 0.01
    model.eval()
    assert torch.equal(conv.weight, conv.parametrizations.weight.original)
    names = [name for name, _ in model.named_parameters() if "logits" in name]
    assert names == [f"backbone.layers.{layer}.mixer.channel_gate.logits" for layer in (0, 1)]
    masks.remove()
    assert model.state_dict().keys() == mamba().state_dict().keys()
    assert not parametrize.is_parametrized(conv)


def test_an_order_moves_the_gates_along() -> None:
    for kind in ("channel", "element"):
        model = mamba()
        masks = attach_masks(model, MaskConfig(kind=kind, target_sparsity=0.5))
        for number, gate in enumerate(masks.gates.values()):
            gate.logits.data = torch.randn(gate.logits.shape, generator=torch.Generator().manual_seed(number))
        masks.target = 0.5
        before = logits(model)
        ChannelOrder("random").update(model)
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_a_masked_model_can_be_copied_and_the_copy_lives_alone() -> None:
    model = mamba()
    masks = attach_masks(model, MaskConfig())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.layers[0].mixer.channel_gate.logits.zero_()
    twin.train()
    twin(**batches()[0]).loss.backward()
    assert twin.backbone.layers[0].mixer.channel_gate.logits.grad is not None
    assert all(gate.logits.grad is None for gate in masks.gates.values())
    masks.remove()
    assert twin.backbone.layers[0].mixer.conv1d.weight.shape == (32, 1, 4)  # torch made one class for both
    assert logits(twin).isfinite().all()


def test_a_gate_closes_an_adapted_weight_and_leaves_the_adapter() -> None:
    model = mamba()
    conv = model.backbone.layers[0].mixer.conv1d
    put_lora(conv, rank=2, scale=1.0)
    nn.init.ones_(conv.parametrizations.weight[0].lora_B)
    adapted = conv.weight.detach().clone()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5))
    masks.target = 0.5
    logits(model)
    assert not conv.weight[~masks.gates["backbone.layers.0.mixer"].kept].any()
    with pytest.raises(ValueError, match="LowRank lies under a gate: merge the adapter"):
        masks.remove(bake=True)
    masks.remove()
    assert torch.equal(conv.weight, adapted)


# ---- budget and export


def test_schedules() -> None:
    config = MaskConfig(target_sparsity=0.6, ramp_start=0.2, ramp_end=0.8, fix_after=1.0)
    assert [config.target(share) for share in (0, 0.2)] == [0, 0]
    assert [config.target(share) for share in (0.8, 1)] == pytest.approx([0.6, 0.6])
    assert config.target(0.5) == pytest.approx(0.6 * (1 - 0.5**3))
    assert (config.temperature(0), config.temperature(1)) == pytest.approx((0.5, 0.1))
    assert config.temperature(0.5) == pytest.approx((0.5 * 0.1) ** 0.5)


def test_the_budget_is_global_and_the_penalty_is_its_distance() -> None:
    masks = attach_masks(mamba(), MaskConfig(target_sparsity=0.5, sparsity_weight=3.0, fix_after=1.0))
    first, second = masks.gates.values()
    first.logits.data.fill_(20)
    second.logits.data.fill_(-20)
    masks.advance(98, 100)
    assert masks.expected_sparsity().item() == pytest.approx(0.5)  # all of it from one layer
    assert masks.penalty().item() == pytest.approx(0, abs=1e-6)
    second.logits.data.fill_(20)
    assert masks.penalty().item() == pytest.approx(1.5)
    with torch.no_grad():
        first.logits[:] = torch.arange(32)
        second.logits[:] = torch.arange(32) + 10
    kept = masks.kept()
    assert [len(units) for units in kept.values()] == [11, 21]  # layers compete
    assert kept["backbone.layers.0.mixer"].tolist() == list(range(21, 32))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.87])
def test_the_exported_count_is_exact_with_ties_too(sparsity: float) -> None:
    groups = channel_groups(mamba())
    for scores in (torch.zeros(32), torch.rand(32), torch.arange(32) // 4):
        kept = select_kept(groups, dict.fromkeys(groups, scores), sparsity)
        assert sum(len(units) for units in kept.values()) == round((1 - sparsity) * 64)
        uniform = select_kept(groups, dict.fromkeys(groups, scores), sparsity, scope="layer")
        assert [len(units) for units in uniform.values()] == [round((1 - sparsity) * 32)] * 2
    model = mamba()
    masks = attach_masks(model, MaskConfig(kind="element", target_sparsity=sparsity))
    total = sum(gate.logits.numel() for gate in masks.gates.values())
    masks.remove(bake=True)
    weights = [
        module.weight
        for layer in model.backbone.layers
        for module in layer.mixer.children()
        if isinstance(module, nn.Linear | nn.Conv1d)
    ]
    assert sum(weight.count_nonzero().item() for weight in weights) == round((1 - sparsity) * total)


def test_whole_blocks_and_equal_groups_are_kept() -> None:
    groups, generator = channel_groups(mamba()), torch.Generator().manual_seed(0)
    scores = {name: torch.rand(32, generator=generator) for name in groups}
    kept = select_kept(groups, scores, 0.5, block=8)
    for name, units in kept.items():
        runs = units.view(-1, 8)
        assert (runs[:, 0] % 8 == 0).all()
        assert (runs.diff(dim=1) == 1).all()
        means = scores[name].view(4, 8).mean(1)
        assert set(means.topk(len(runs)).indices.tolist()) == set((runs[:, 0] // 8).tolist())
    heads = channel_groups(mamba2())
    for units in select_kept(heads, {name: torch.arange(8.0) for name in heads}, 0.5).values():
        assert (units < 4).sum() == (units >= 4).sum()
    with pytest.raises(ValueError, match="block=5 does not divide the 32 adjacent units"):
        select_kept(groups, scores, 0.5, block=5)
    with pytest.raises(ValueError, match=r"target_sparsity=0.9 leaves 6 units, too few for one block of 8"):
        select_kept(groups, scores, 0.9, block=8)
    dominated = {name: torch.arange(32.0) + 100 * number for number, name in enumerate(groups)}
    assert [len(units) for units in select_kept(groups, dominated, 0.5).values()] == [1, 31]  # none is emptied


def test_gates_start_from_the_scores_of_the_whole_model() -> None:
    model = mamba()
    groups = channel_groups(model)
    scores = channel_importance(model, batches(), groups)
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5, initial_logit=2.0, logit_spread=1.5), scores)
    together = torch.cat([gate.logits.detach() for gate in masks.gates.values()])
    assert (together.min(), together.max()) == pytest.approx((0.5, 3.5))
    assert torch.equal(together.argsort(), torch.cat(list(scores.values())).argsort())
    one_shot = select_kept(groups, scores, 0.5)
    assert all(torch.equal(one_shot[name], units) for name, units in masks.kept().items())
    with pytest.raises(ValueError, match=r"scores has no \(32,\) scores for backbone.layers.0.mixer"):
        masks.start_from({})


# ---- training


def trained_by_hand(steps: int, accumulate: int) -> tuple[nn.Module, Any]:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5, sparsity_weight=2.0, fix_after=0.9))
    optimizer = torch.optim.AdamW(masks.parameter_groups(model, 0.1), lr=1e-3, eps=1e-4, weight_decay=0.0)
    rows = tokens(32, 8)
    for step in range(steps):
        masks.advance(step, steps)
        for piece in rows[4 * step : 4 * step + 4].split(4 // accumulate):
            (model(input_ids=piece, labels=piece).loss / accumulate).backward()
        masks.penalty().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, masks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_stock_trainer_with_the_callback_is_the_plain_loop(tmp_path: Path, accumulate: int) -> None:
    expected, _ = trained_by_hand(4, accumulate)
    model = mamba()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5, sparsity_weight=2.0, fix_after=0.9))
    optimizer = torch.optim.AdamW(masks.parameter_groups(model, 0.1), lr=1e-3, eps=1e-4, weight_decay=0.0)
    settings: dict[str, Any] = {"max_steps": 4, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    settings |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_steps": 2}
    arguments = TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", **settings)
    rows = [{"input_ids": row, "labels": row} for row in tokens(32, 8)]
    update = {"optimizers": (optimizer, None), "callbacks": [MaskUpdate(masks)]}
    trainer = Trainer(model, arguments, train_dataset=rows, **update)
    trainer.train()
    for (name, want), found in zip(expected.named_parameters(), model.parameters()):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=name)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["target_sparsity"] for entry in history][-1] == 0.5
    assert history[0]["masking_tau"] == 0.5 > history[-1]["masking_tau"]
    assert all(entry["regularizer"] >= 0 for entry in history)
    finished = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows, **update).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, finished[name], rtol=0, atol=0, msg=name)


def test_a_fixed_choice_stays_and_is_exact_in_training_too() -> None:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.4, fix_after=0.5))
    optimizer = torch.optim.AdamW(masks.parameter_groups(model, 0.3), lr=1e-3)
    for step in range(20):
        masks.advance(step, 20)
        assert masks.fixed == (step >= 10)
        if step == 10:
            kept = masks.kept()
            assert sum(len(units) for units in kept.values()) == round(0.6 * 64)
        (model(**batches(1)[0]).loss + masks.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 10:
            assert {0.0, 1.0} == {round(value, 6) for gate in masks.gates.values() for value in gate().tolist()}
            assert masks.penalty().item() == pytest.approx(0, abs=0.51 * masks.config.sparsity_weight / 64)
    assert all(torch.equal(units, kept[name]) for name, units in masks.kept().items())
    model.eval()
    soft, expected = logits(model), copy.deepcopy(model)
    expected.backbone.layers[0].mixer.channel_gate.train()
    torch.testing.assert_close(soft, logits(expected), rtol=0, atol=1e-4)


def test_training_reaches_the_budget() -> None:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5, ramp_end=0.7, fix_after=1.0))
    optimizer = torch.optim.AdamW(masks.parameter_groups(model, 0.3), lr=1e-3)
    for step in range(40):
        masks.advance(step, 41)  # its last step, which would make the choice, is never reached
        (model(**batches(1)[0]).loss + masks.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert masks.expected_sparsity().item() == pytest.approx(0.5, abs=0.05)
    assert 0.5 - 0.15 < sum(masks.sparsity_by_gate().values()) / 2 < 0.5 + 0.15


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"kind": "chanel"}, "did you mean 'channel'"),
        ({"target_sparsity": 1.0}, "target_sparsity=1.0 must be at least 0 and below 1"),
        ({"final_tau": 0.9}, "final_tau=0.9 must be above 0 and at most masking_tau=0.5"),
        ({"ramp_start": 0.35}, "fix_after=0.4 must be ascending shares of training"),
        ({"sparsity_weight": float("nan")}, "sparsity_weight=nan must be 0 or a positive number"),
        ({"kind": "element", "states": True}, "states and block belong to kind='channel'"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"target_sparsity": -0.1}, "target_sparsity=-0.1 must be at least 0 and below 1"),
        ({"final_tau": 0.0}, "final_tau=0.0 must be above 0"),
        ({"fix_after": 1.1}, "fix_after=1.1 must be ascending shares of training"),
        ({"sparsity_weight": -1.0}, "sparsity_weight=-1.0 must be 0 or a positive number"),
        ({"sparsity_weight": float("inf")}, "sparsity_weight=inf must be 0 or a positive number"),
        ({"kind": "element", "block": 2}, "states and block belong to kind='channel'"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MaskConfig(**settings)


def test_a_gate_that_would_not_close_is_refused() -> None:
    adapted = get_peft_model(plain_llama(), LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"mlp.up_proj is wrapped by Linear, whose output a gate .* merge the adapter"):
        attach_masks(adapted, MaskConfig())
    model = mamba()
    masks = attach_masks(model, MaskConfig())
    with pytest.raises(ValueError, match="conv1d has gates already"):
        attach_masks(model, MaskConfig())
    with pytest.raises(ValueError, match="kind='element' removes no channel"):
        attach_masks(mamba(), MaskConfig(kind="element")).kept()

    class Shifted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    parametrize.register_parametrization(model.backbone.layers[0].mixer.conv1d, "weight", Shifted())
    with pytest.raises(ValueError, match="Shifted lies over a gate"):
        masks.remove()


# ---- one number at a time


@pytest.mark.parametrize("relaxation", ["logistic", "hard_concrete"])
def test_gates_and_expected_sparsity_follow_the_temperature_of_the_step(relaxation: str) -> None:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(relaxation=relaxation, initial_logit=0.8, fix_after=1.0))
    for step in (0, 60):
        masks.advance(step, 100)
        tau = 0.5 * (0.1 / 0.5) ** (step / 99)
        for gate in masks.gates.values():
            assert gate.logits.eq(0.8).all()
            soft = torch.sigmoid((0.8 + gate.noise) / tau)
            expected = soft if relaxation == "logistic" else (1.2 * soft - 0.1).clamp(0, 1)
            torch.testing.assert_close(gate(), expected)
        shift = 0.0 if relaxation == "logistic" else tau * torch.tensor(0.1 / 1.1).log().item()
        open_share = torch.sigmoid(torch.tensor(0.8 - shift)).item()
        assert masks.expected_sparsity().item() == pytest.approx(1 - open_share)
    first, second = masks.gates.values()
    assert not torch.equal(first.noise, second.noise)
    masks.advance(99, 100)
    assert (masks.temperature, masks.target) == pytest.approx((0.1, 0.3))


def test_noise_is_finite_where_the_uniform_draw_is_zero() -> None:
    uniform = torch.rand(1 << 20, generator=torch.Generator().manual_seed(ZERO_DRAWN))
    assert (uniform == 0).any()
    noise = logistic_noise((1 << 20,), torch.Generator().manual_seed(ZERO_DRAWN))
    assert noise.isfinite().all()


def test_the_expected_sparsity_is_a_mean_over_gates_not_over_blocks() -> None:
    masks = attach_masks(jamba(), MaskConfig(target_sparsity=0.5, sparsity_weight=2.0))
    sizes = [gate.logits.numel() for gate in masks.gates.values()]
    assert len(set(sizes)) > 1
    for number, gate in enumerate(masks.gates.values()):
        gate.logits.data.fill_(30.0 if number else -30.0)
    closed = sizes[0] / sum(sizes)
    assert masks.expected_sparsity().item() == pytest.approx(closed)
    assert masks.penalty().item() == pytest.approx(2 * closed)  # the target is 0 at the first step
    masks.target = 0.5 * closed
    assert masks.penalty().item() == pytest.approx(closed)  # too many closed costs as much as too few
    assert list(masks.sparsity_by_gate().values()) == [1.0] + [0.0] * (len(sizes) - 1)


def test_what_an_optimizer_gets() -> None:
    model = mamba()
    model.backbone.embeddings.requires_grad_(False)
    masks = attach_masks(model, MaskConfig())
    others, gates = masks.parameter_groups(model, gate_lr=0.25)
    assert gates == {"params": [gate.logits for gate in masks.gates.values()], "lr": 0.25, "weight_decay": 0.0}
    found = {id(parameter) for parameter in others["params"]}
    wanted = {n: p for n, p in model.named_parameters() if "_gate" not in n and "embeddings" not in n}
    assert found == {id(parameter) for parameter in wanted.values()}
    assert others.keys() == {"params"}


@pytest.mark.parametrize("kind", ["channel", "element"])
def test_in_bfloat16(kind: str) -> None:
    model = mamba().bfloat16().train()
    masks = attach_masks(model, MaskConfig(kind=kind))
    conv = model.backbone.layers[0].mixer.conv1d
    assert conv.weight.dtype == torch.bfloat16
    assert all(gate.logits.dtype == torch.float32 for gate in masks.gates.values())
    model(**batches(1)[0]).loss.backward()
    assert all(gate.logits.grad.any() for gate in masks.gates.values())


def test_a_checkpoint_of_a_masked_model_holds_the_logits_and_nothing_else_of_the_gates() -> None:
    model, plain = mamba(), mamba().state_dict().keys()
    masks = attach_masks(model, MaskConfig())
    added = {name for name in model.state_dict() if name.replace("parametrizations.", "") not in plain}
    parts = {f"conv1d.parametrizations.{name}.original" for name in ("weight", "bias")}
    parts |= {"channel_gate.logits", "channel_gate.learned"}
    assert added == {f"backbone.layers.{layer}.mixer.{part}" for layer in (0, 1) for part in parts}
    masks.remove()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["channel", "element"])
def test_what_is_baked_in_training_mode_is_the_weight_or_zero(kind: str) -> None:
    model, plain = mamba().train(), mamba().state_dict()
    attach_masks(model, MaskConfig(kind=kind, target_sparsity=0.4)).remove(bake=True)
    for name, value in model.state_dict().items():
        assert bool(((value == plain[name]) | (value == 0)).all()), name
    assert model.training


def test_a_choice_by_hand_is_that_of_the_target_in_whole_blocks_of_neighbors() -> None:
    masks = attach_masks(mamba(), MaskConfig(target_sparsity=0.5, block=8))
    for number, gate in enumerate(masks.gates.values()):
        gate.logits.data = torch.randn(32, generator=torch.Generator().manual_seed(number))
    kept = masks.kept()
    assert sum(len(units) for units in kept.values()) == 32
    for units in kept.values():
        assert (units.view(-1, 8).diff(dim=1) == 1).all()
    masks.fix()  # at a step whose target is still 0
    assert masks.fixed
    assert all(torch.equal(masks.gates[name].kept.nonzero().flatten(), units) for name, units in kept.items())


def test_mlps_are_left_alone_where_asked() -> None:
    assert set(attach_masks(jamba(), MaskConfig(mlps=False)).gates) == {"model.layers.0.mamba"}


def test_evaluation_follows_the_logits_and_the_target() -> None:
    model = mamba()
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5))
    gate = masks.gates["backbone.layers.0.mixer"]
    logits(model)
    assert gate.kept.all()
    masks.target = 0.25
    gate.logits.data[:16] -= 1
    logits(model)
    assert gate.kept.tolist() == [False] * 16 + [True] * 16
    masks.target = 0.125
    logits(model)
    assert gate.kept.sum() == 24
    with torch.no_grad():
        gate.logits.copy_(gate.logits.flip(0))
    logits(model)
    assert gate.kept[:16].all()


# ---- which units


def test_small_bundles_fill_what_large_ones_leave() -> None:
    """Blocks of 8 channels, single states: 18 of the best of each block, then 16, and 2 states."""
    model = mamba()
    groups = {**channel_groups(model), **state_groups(model)}
    scores = {name: torch.full((group.units,), float(group.kind == "channel")) for name, group in groups.items()}
    kept = select_kept(groups, scores, 0.5, block=8)
    assert sum(len(units) for units in kept.values()) == 36
    assert [len(units) for name, units in kept.items() if name.endswith(":states")] in ([3, 1], [2, 2])


def test_of_each_group_of_heads_its_own_best_stay_and_their_mean_decides_between_blocks() -> None:
    groups = channel_groups(mamba2())
    first, second = groups
    up, down = torch.arange(4.0), torch.arange(4.0).flip(0)
    scores = {first: torch.cat([10 * up, down]), second: torch.cat([down, 6 * up])}
    kept = select_kept(groups, scores, 0.25)  # pairs of 16.5, 11, 5.5, 0 and of 10.5, 7, 3.5, 0: six of them
    assert [units.tolist() for units in kept.values()] == [[1, 2, 3, 4, 5, 6], [0, 1, 2, 5, 6, 7]]
    kept = select_kept(groups, scores, 0.5)
    assert [units.tolist() for units in kept.values()] == [[2, 3, 4, 5], [0, 1, 6, 7]]
    scores[second] = torch.cat([down, 12 * up])  # pairs of 19.5, 13, 6.5, 0
    scores[first] = torch.cat([10 * up, 0 * down])  # of 15, 10, 5, 0
    kept = select_kept(groups, scores, 0.375)
    assert [units.tolist() for units in kept.values()] == [[2, 3, 4, 5], [0, 1, 2, 5, 6, 7]]


# ---- the callback by itself


def test_the_callback_adds_to_what_there_is_and_passes_over_frozen_gates() -> None:
    model = mamba().train()
    masks = attach_masks(model, MaskConfig(sparsity_weight=3.0))
    first, second = masks.gates.values()
    second.logits.requires_grad_(False)
    (expected,) = torch.autograd.grad(masks.penalty(), first.logits)
    assert expected.any()
    callback = MaskUpdate(masks)
    with torch.no_grad():
        for times in (1, 2):
            callback.on_pre_optimizer_step(None, None, None)
            torch.testing.assert_close(first.logits.grad, times * expected)
    assert second.logits.grad is None


def test_the_callback_logs_beside_the_loss_only() -> None:
    masks = attach_masks(mamba(), MaskConfig(sparsity_weight=3.0, initial_logit=0.0))
    masks.target = 0.25
    state = SimpleNamespace(log_history=[{"loss": 1.0}])
    logs = {"loss": 1.0}
    MaskUpdate(masks).on_log(None, state, None, logs)
    assert logs == state.log_history[-1]
    found = {"loss": 1.0, "regularizer": 0.75, "sparsity": 0.5, "target_sparsity": 0.25, "masking_tau": 0.5}
    assert logs == pytest.approx(found)
    state.log_history.append({"train_runtime": 1.0})
    MaskUpdate(masks).on_log(None, state, None, {"train_runtime": 1.0})
    assert state.log_history[-1] == {"train_runtime": 1.0}


def test_half_precision_without_clipping_is_refused() -> None:
    callback = MaskUpdate(attach_masks(mamba(), MaskConfig()))
    with pytest.raises(ValueError, match=r"max_grad_norm=0.0 with fp16 .* set max_grad_norm, or use bf16"):
        callback.on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=0.0), None, None)
    for fine in (SimpleNamespace(fp16=True, max_grad_norm=1.0), SimpleNamespace(fp16=False, max_grad_norm=0.0)):
        callback.on_train_begin(fine, None, None)

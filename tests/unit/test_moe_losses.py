"""Auxiliary losses by hand, and how they reach the model's loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

from moe_methods import mixture
from monkeyjump.moe.auxiliary import AuxiliaryLosses
from monkeyjump.moe.layer import ExpertLayer
from monkeyjump.moe.losses import Decision, balance, contrast, load_balance, orthogonality
from monkeyjump.moe.routing import route, sample_per_expert
from tiny import left_padded, llama, tokens, trainable

# ---------------------------------------------------------------------- by hand


def test_routing_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    gates, p, chosen = route(logits, 2)
    torch.testing.assert_close(p, torch.tensor([[1 / 8, 2 / 8, 5 / 8]]))
    torch.testing.assert_close(gates, torch.tensor([[0, 2 / 7, 5 / 7]]))
    assert chosen.tolist() == [[False, True, True]]
    assert torch.equal(route(logits, None)[0], p)
    assert torch.equal(route(logits, 3)[0], p)


def test_load_balance_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.9, 0.05, 0.05]])
    chosen = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
    f, mean = (2 / 6, 2 / 6, 2 / 6), (1.5 / 3, 0.95 / 3, 0.55 / 3)
    assert balance(p, chosen, None).item() == pytest.approx(3 * sum(a * b for a, b in zip(f, mean)))
    real = torch.tensor([True, True, False])  # the third token is padding
    f, mean = (1 / 4, 2 / 4, 1 / 4), (0.6 / 2, 0.9 / 2, 0.5 / 2)
    assert balance(p, chosen, real).item() == pytest.approx(3 * sum(a * b for a, b in zip(f, mean)))
    assert balance(p, chosen, torch.zeros(3, dtype=torch.bool)).item() == 0.0


def test_load_balance_of_a_block_concatenates_its_projections() -> None:
    p, chosen = torch.tensor([[0.75, 0.25]]), torch.tensor([[True, False]])
    one = Decision("b0", "q", p, chosen, None)
    other = Decision("b0", "v", p.flip(1), chosen.flip(1), torch.tensor([True]))
    assert [v.item() for v in load_balance([one, other])] == [1.5, 1.5]
    assert [v.item() for v in load_balance([one, other], "block")] == [1.0]


def test_contrast_by_hand() -> None:
    # two experts, two outputs each; the last is not there, so expert 1 has no pair and is no anchor
    outputs = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[5.0, 5.0], [9.0, 9.0]]])
    there = torch.tensor([[True, True], [True, False]])
    own, other = math.exp(0.0 / 0.5), math.exp(math.sqrt(0.5) / 0.5)
    assert contrast(outputs, there, 0.5).item() == pytest.approx(-math.log(own / (own + other)))


def test_contrast_of_outputs_without_direction_is_zero_with_a_finite_gradient() -> None:
    outputs = torch.zeros(2, 3, 4, requires_grad=True)
    value = contrast(outputs, torch.ones(2, 3, dtype=torch.bool), 0.1)
    value.backward()
    assert value.item() == 0.0
    assert not outputs.grad.any()


def test_contrast_falls_where_experts_move_apart() -> None:
    torch.manual_seed(0)
    alike = torch.randn(1, 8, 16).expand(3, -1, -1) + 0.01 * torch.randn(3, 8, 16)
    apart = torch.eye(3, 16).unsqueeze(1) + 0.01 * torch.randn(3, 8, 16)
    there = torch.ones(3, 8, dtype=torch.bool)
    assert contrast(apart, there, 0.1) < contrast(alike, there, 0.1)


def test_orthogonality_by_hand() -> None:
    two = torch.stack([torch.eye(2, 3), 2 * torch.eye(2, 3)])  # norms of 0 and of 3 I
    assert orthogonality([two]).item() == pytest.approx((0 + 3 * math.sqrt(2)) / 2)


def test_samples_are_real_tokens_of_their_expert() -> None:
    x, chosen = torch.arange(20.0).unsqueeze(1), torch.zeros(20, 2, dtype=torch.bool)
    chosen[:10, 0] = chosen[18:, 1] = True
    inputs, there = sample_per_expert(x, chosen, torch.arange(20) != 18, 4)
    assert there.sum(-1).tolist() == [4, 1]
    assert set(inputs[0, :, 0].tolist()) <= set(range(10))
    assert len(set(inputs[0, :, 0].tolist())) == 4
    assert inputs[1][there[1]].tolist() == [[19.0]]


# ---------------------------------------------------------------------- in the model's loss


def loss_of(model: PeftModel, **inputs: Any) -> Tensor:
    ids = inputs.pop("input_ids", tokens())
    return model(input_ids=ids, labels=ids, **inputs).loss


def auxiliary(model: PeftModel, **weights: float) -> float:
    """The weighted sum of what the latest forward read."""
    return sum(weights[name] * value.item() for name, value in model.auxiliary_losses().items())


WEIGHTS = {
    "moelora": ({"balance_weight": 0.5, "contrastive_weight": 0.25}, {"load_balance": 0.5, "contrastive": 0.25}),
    "mola": ({"balance_weight": 0.5}, {"load_balance": 0.5}),
    "moe_lora": ({"balance_weight": 0.5}, {"load_balance": 0.5}),
    "moe_adalora": ({"orth_reg_weight": 0.5}, {"orthogonality": 0.5}),
    "moe_propulsion": ({"balance_weight": 0.5}, {"load_balance": 0.5}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_are_added_in_training_only_and_can_be_read(name: str) -> None:
    given, weights = WEIGHTS[name]
    model = mixture(name, **given)
    plain = loss_of(model.eval())
    assert model.auxiliary_losses() == {}
    trained = loss_of(model.train())
    assert model.auxiliary_losses().keys() == weights.keys()
    assert auxiliary(model, **weights) > 0.1
    assert (trained - plain).item() == pytest.approx(auxiliary(model, **weights), rel=1e-4)
    with model.disable_adapter():
        assert torch.equal(loss_of(model), loss_of(llama()))


def test_losses_equal_those_of_the_layers_alone() -> None:
    model = mixture("moelora", balance_weight=1.0, contrastive_weight=1.0).train()
    seen: dict[str, Tensor] = {}
    layers = {m.name: m for m in model.modules() if isinstance(m, ExpertLayer)}
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda m, args: seen.update({m.name: args[0].detach()}))
    loss_of(model)
    balances, contrasts = [], []
    for name, layer in layers.items():
        x = seen[name].flatten(0, 1)
        p = torch.softmax(x @ layer.mixture_router["default"].T, -1)
        chosen = torch.zeros_like(p, dtype=torch.bool)
        for row, best in zip(chosen, p.topk(2).indices):
            row[best] = True
        balances.append(4 * sum(chosen[:, n].sum() / chosen.sum() * p[:, n].mean() for n in range(4)))
        outputs = []
        for mine in (slice(2 * n, 2 * n + 2) for n in range(4)):
            delta = layer.mixture_B["default"][:, mine] @ layer.mixture_A["default"][mine]
            outputs.append(torch.stack([8 * delta @ token for token in x]))
        contrasts.append(contrast(torch.stack(outputs), chosen.T, 0.1))  # 18 tokens: fewer than are sampled at most
    found = model.auxiliary_losses()
    torch.testing.assert_close(found["load_balance"], torch.stack(balances).mean())
    torch.testing.assert_close(found["contrastive"], torch.stack(contrasts).mean().detach())


def test_mola_sums_over_layers() -> None:
    model = mixture("mola", balance_weight=1.0, num_experts=[1, 4]).train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, ExpertLayer):
                m.mixture_router["default"].zero_()  # uniform: every layer's value is 1
    loss_of(model)
    assert model.auxiliary_losses()["load_balance"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["moelora", "mola"])
def test_padding_changes_no_loss(name: str) -> None:
    model = mixture(name, balance_weight=1.0).train()
    row = tokens(1, 6)
    alone = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    padded = left_padded([row, torch.zeros(1, 0, dtype=torch.long), tokens(1, 9)])
    padded = {key: value[:1] for key, value in padded.items()}
    assert padded["input_ids"].shape == (1, 9)
    found = []
    for batch in (alone, padded):
        model(**batch, labels=batch["input_ids"])
        found.append(model.auxiliary_losses())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_nothing_twice(reentrant: bool) -> None:
    weights = {"balance_weight": 0.0, "contrastive_weight": 0.0} if reentrant else {"balance_weight": 1.0}
    found = []
    for checkpointing in (False, True):
        model = mixture("moelora", contrastive_tokens=4, lora_dropout=0.3, **weights)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(7)
        loss = sum(loss_of(model, input_ids=tokens(seed=seed)) for seed in range(2))  # two forwards, one backward
        loss.backward()
        found.append((loss, model.auxiliary_losses(), {n: p.grad for n, p in trainable(model).items()}))
    torch.testing.assert_close(found[1], found[0])


def test_reentrant_checkpointing_is_refused_where_losses_would_get_no_gradient() -> None:
    model = mixture("moelora")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing; set .*'use_reentrant': False"):
        loss_of(model.train())


def test_losses_are_shared_out_over_an_accumulated_step() -> None:
    model = mixture("mola", num_experts=[1, 1], top_k=1, balance_weight=3.0)  # the loss is 2 whatever the tokens
    parts = [tokens(2, 5, seed=1), tokens(2, 9, seed=2)]
    told = {"num_items_in_batch": torch.tensor(sum(p[:, 1:].numel() for p in parts))}
    without = sum(loss_of(model.eval(), input_ids=p, **told) for p in parts)
    with_it = sum(loss_of(model.train(), input_ids=p, **told) for p in parts)
    assert (with_it - without).item() == pytest.approx(6.0, rel=1e-4)


def test_output_as_a_tuple_carries_the_losses() -> None:
    model, ids = mixture("moelora", balance_weight=1.0).train(), tokens()
    loss, *_ = model(input_ids=ids, labels=ids, return_dict=False)
    assert torch.equal(loss, loss_of(model))


def test_loss_that_the_model_does_not_compute_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mixture("moelora").train()
    for _ in range(2):
        model(input_ids=tokens())
    assert sum("losses (load_balance, contrastive) act on nothing" in r.getMessage() for r in caplog.records) == 1


def test_nothing_of_a_forward_pass_is_held_after_it() -> None:
    model = mixture("moelora").train()
    loss_of(model)
    with pytest.raises(IndexError):
        loss_of(model, attention_mask=torch.ones(1, 3))
    model.base_model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model)
    holder: AuxiliaryLosses = model.base_model.auxiliary
    assert holder._notes is None
    assert not any(value.requires_grad for value in holder.latest.values())


class Losses(Trainer):
    """Trainer that keeps the loss of every micro-batch as it was trained on."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen.append(loss.item())
        return loss


def test_stock_trainer_trains_on_the_losses_like_a_hand_loop(tmp_path: Path) -> None:
    rows = [{"input_ids": tokens(1, 5 + i % 3, seed=i)[0]} for i in range(8)]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        padded = left_padded([row["input_ids"].unsqueeze(0) for row in batch])
        return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}

    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, learning_rate=0.05,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, report_to=[], save_strategy="no", use_cpu=True,
        train_sampling_strategy="sequential", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trained = mixture("moelora", balance_weight=1.0, contrastive_weight=0.1)
    trainer = Losses(trained, arguments, train_dataset=rows, data_collator=collate)
    trainer.seen = []
    trainer.train()

    by_hand, losses = mixture("moelora", balance_weight=1.0, contrastive_weight=0.1).train(), []
    optimizer = torch.optim.SGD(trainable(by_hand).values(), lr=0.05)
    for step in range(2):
        micro = [collate(rows[i : i + 2]) for i in range(4 * step, 4 * step + 4, 2)]
        counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in micro]
        for batch, count in zip(micro, counts):
            by_hand.eval()
            task = by_hand(**batch).loss
            by_hand.train()
            by_hand(**batch)
            mixed = auxiliary(by_hand, load_balance=1.0, contrastive=0.1)
            losses.append((task.item() + mixed) * count / sum(counts))
            (by_hand(**batch).loss * count / sum(counts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trainer.seen == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(dict(trainable(trained)), dict(trainable(by_hand)), rtol=1e-4, atol=1e-6)

"""Routed AdaLoRA: its penalty, its rank schedule really running, its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model

from monkeyjump import CenterUpdate
from monkeyjump.tuner.adalora import orthogonality_penalty
from tiny import LLAMA_TARGETS, llama, routed, tokens, trainable

RANKS = {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 1, "deltaT": 1}


def model_and_update(**config: object) -> tuple[PeftModel, CenterUpdate, torch.optim.Optimizer]:
    model = routed(llama(), base="adalora", target_modules=["q_proj", "k_proj", "v_proj"], **RANKS, **config).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    return model, CenterUpdate(every=1).attach(model, optimizer, total_steps=6), optimizer


def step(model: PeftModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def active_ranks(model: PeftModel) -> int:
    return sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "lora_E" in n)


def test_the_penalty_equals_pefts() -> None:
    typed = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **RANKS}
    mine = routed(llama(), base="adalora", shared_modules=[], **typed).train()
    plain = get_peft_model(llama(), AdaLoraConfig(**typed)).train()
    for name, value in trainable(mine).items():
        if "lora_E" in name:
            value.data.zero_()  # then neither adapter adds anything, and the losses differ by the penalty alone
        plain.get_parameter(name).data.copy_(value)
    ids = tokens()
    ours, theirs = mine(ids, labels=ids).loss, plain(ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours - llama()(ids, labels=ids).loss, 0.5 * orthogonality_penalty(mine, "default"))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_penalty_is_shared_out_over_an_accumulated_step(task_type: str | None) -> None:
    """PEFT adds all of it to every micro-batch; ours adds up to it once per step."""
    model, _, _ = model_and_update(task_type=task_type)
    parts = [tokens(2, 5, seed=1), tokens(2, 9, seed=2)]
    told = {"num_items_in_batch": torch.tensor(sum(p[:, 1:].numel() for p in parts))}
    penalty = 0.5 * orthogonality_penalty(model, "default").item()
    with_it = sum(model(p, labels=p, **told).loss for p in parts)
    without = sum(model.eval()(p, labels=p, **told).loss for p in parts)
    assert (with_it - without).item() == pytest.approx(penalty, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_losses_without_the_adapter_carry_no_penalty(training: bool) -> None:
    """A reference pass of DPO or of a KL term disables the adapter and may train."""
    model, _, _ = model_and_update()
    model.train(training)
    ids = tokens()
    with model.disable_adapter():
        assert torch.equal(model(ids, labels=ids).loss, llama()(ids, labels=ids).loss)


def test_training_without_the_rank_schedule_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = routed(llama(), base="adalora", target_modules=["q_proj"], **RANKS).train()
    for _ in range(2):
        model(tokens(), labels=tokens())
    assert sum("without its rank schedule" in r.getMessage() for r in caplog.records) == 1


def test_the_rank_schedule_prunes_to_its_target() -> None:
    model, _, optimizer = model_and_update()
    before = active_ranks(model)
    for seed in range(6):
        step(model, optimizer, seed)
    matrices = sum("lora_E" in n for n, _ in model.named_parameters())
    assert before == 4 * matrices
    assert active_ranks(model) == 2 * matrices


def test_a_pruned_adapter_reloads_and_works_with_labels(tmp_path: Path) -> None:
    model, _, optimizer = model_and_update()
    for seed in range(6):
        step(model, optimizer, seed)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    ids = tokens()
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert again(ids, labels=ids).loss.isfinite()


def test_a_resumed_rank_schedule_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _, optimizer = model_and_update()
    for seed in range(3):
        step(whole, optimizer, seed)
    whole.save_pretrained(tmp_path)
    for seed in range(3, 6):
        step(whole, optimizer, seed)
    part = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).train()
    optimizer = torch.optim.SGD(trainable(part).values(), lr=0.1)
    CenterUpdate(every=1).attach(part, optimizer, total_steps=6, completed=3)
    for seed in range(3, 6):
        step(part, optimizer, seed)
    for (name, one), other in zip(trainable(part).items(), trainable(whole).values()):
        assert torch.equal(one, other), name


def test_a_schedule_over_another_number_of_steps_is_refused() -> None:
    model = routed(llama(), base="adalora", target_modules=LLAMA_TARGETS, **RANKS)
    with pytest.raises(ValueError, match=r"total_step=6 .* 24 optimizer steps; set total_step=24"):
        CenterUpdate().attach(model, torch.optim.SGD(trainable(model).values(), lr=0.1), total_steps=24)

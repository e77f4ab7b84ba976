"""The rank schedule over mixtures: one budget for all experts' triplets, pruned, saved and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from moe_methods import mixture, mixture_config
from monkeyjump.moe import RankUpdate
from monkeyjump.moe.layer import ExpertLayer
from tiny import llama, tokens, trainable

RANKS = {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 1, "deltaT": 1, "num_experts": 3}
TRIPLETS = 3 * 4 * 2 * 2  # experts, ranks, projections, blocks


def model_of(**changes: Any) -> PeftModel:
    return mixture("moe_adalora", target_modules=["q_proj", "v_proj"], **{**RANKS, **changes}).train()


def step(model: PeftModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def run(model: PeftModel, seeds: range) -> None:
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    RankUpdate().attach(model, optimizer, completed=seeds.start)
    for seed in seeds:
        step(model, optimizer, seed)


def left(model: PeftModel) -> int:
    return sum(int(p.count_nonzero()) for n, p in model.named_parameters() if "mixture_E" in n)


def test_pruning_takes_the_lowest_triplets_of_all_experts_together() -> None:
    model = model_of(tinit=0, tfinal=0, total_step=8)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    RankUpdate().attach(model, optimizer)
    importance: dict[tuple[str, int], float] = {}
    model(tokens(), labels=tokens()).loss.backward()
    for layer in (m for m in model.modules() if isinstance(m, ExpertLayer)):

        def score(parameter: Tensor) -> Tensor:  # averages start at zero: I = 0.15 i, U = 0.15 |i - I|
            i = (parameter * parameter.grad).abs()
            return 0.15 * i * 0.15 * (i - 0.15 * i)

        lam, q, p = (getattr(layer, f"mixture_{kind}")["default"] for kind in "EAB")
        total = score(lam)[:, 0] + score(q).mean(1) + score(p).mean(0)
        importance.update({(layer.name, j): value.item() for j, value in enumerate(total)})
    optimizer.step()
    budget = int((TRIPLETS - TRIPLETS // 2) * (1 - 1 / 8) ** 3 + TRIPLETS // 2)
    kept = set(sorted(importance, key=lambda triplet: -importance[triplet])[:budget])
    for layer in (m for m in model.modules() if isinstance(m, ExpertLayer)):
        for j, value in enumerate(layer.mixture_E["default"][:, 0]):
            assert bool(value) == ((layer.name, j) in kept)


def test_ranks_end_at_their_target_and_stay_there() -> None:
    model = model_of()
    before = left(model)
    run(model, range(6))
    assert (before, left(model)) == (TRIPLETS, TRIPLETS // 2)


def test_equal_ranks_are_never_pruned() -> None:
    model = model_of(target_r=4)
    run(model, range(6))
    assert left(model) == TRIPLETS


def test_resumed_schedule_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    for stop in (3, 5):  # while it prunes, and after its last pruning
        whole = model_of()
        run(whole, range(stop))
        whole.save_pretrained(tmp_path / str(stop))
        whole.train()
        run_on = PeftModel.from_pretrained(llama(), tmp_path / str(stop), is_trainable=True).train()
        for model in (whole, run_on):
            run(model, range(stop, 6))
        torch.testing.assert_close(dict(trainable(run_on)), dict(trainable(whole)), rtol=0, atol=0)
        assert left(run_on) == TRIPLETS // 2


def test_pruned_adapter_reloads_for_inference(tmp_path: Path) -> None:
    model = model_of()
    run(model, range(6))
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_stock_trainer_prunes_with_the_callback(tmp_path: Path) -> None:
    def trainer(model: PeftModel) -> Trainer:
        arguments = TrainingArguments(
            tmp_path, max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in tokens(12)]
        return Trainer(model, arguments, train_dataset=rows, callbacks=[RankUpdate()])

    model = model_of()
    trainer(model).train()
    assert left(model) == TRIPLETS // 2
    with pytest.raises(ValueError, match=r"total_step=9 .* 6 optimizer steps; set total_step=6"):
        trainer(model_of(total_step=9)).train()


def test_rank_update_without_ranks_is_refused() -> None:
    model = get_peft_model(llama(), mixture_config("moe_lora"))
    with pytest.raises(ValueError, match="no mixture of AdaLoRA experts that trains"):
        RankUpdate().attach(model, torch.optim.SGD(trainable(model).values()))

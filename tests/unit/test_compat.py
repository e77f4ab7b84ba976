"""The three steps of the authors' README, with their names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from monkeyjump import describe_routing
from monkeyjump.compat import MonkeyTrainer, apply_monkeyjump, init_router_centers
from monkeyjump.tuner.model import routers
from tiny import llama, tokens


def test_the_readmes_three_steps(tmp_path: Path) -> None:
    model = apply_monkeyjump(
        llama(),
        blocks={"LlamaDecoderLayer": [0, 1]},
        linears=["v_proj", "q_proj", "k_proj", "o_proj"],
        shared_expert=["up_proj", "down_proj"],
        rank=2,
        alpha=16.0,
        temperature=1.0,
        ema_momentum=0.2,
        top_k=2,
        rep_mode="token",
    )
    block = describe_routing(model).blocks[0]
    assert [slot.rpartition(".")[2] for slot in block.routed] == ["v_proj", "q_proj", "k_proj", "o_proj"]
    assert [slot.rpartition(".")[2] for slot in block.shared] == ["up_proj", "down_proj"]
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(16, 6)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    trainer = MonkeyTrainer(model=model, args=arguments, train_dataset=data, step_interval=1, stop_update_step=2)
    init_router_centers(trainer, subset_size=16, kmeans_iters=15, rep_mode="token")
    before = [r.centers["default"].clone() for r in routers(model)]
    trainer.train()
    assert not any(torch.equal(b, r.centers["default"]) for b, r in zip(before, routers(model)))
    assert routers(model)[0].configs["default"].ema_momentum == 0.2


def test_wrong_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"LamaDecoderLayer.*did you mean 'LlamaDecoderLayer'"):
        apply_monkeyjump(llama(), blocks={"LamaDecoderLayer": [0]}, linears=["q_proj"])

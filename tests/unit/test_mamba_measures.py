"""What `adapt` measures of a model, against numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monkeyjump.allocation import allocate_peft, attach_peft
from monkeyjump.mamba.adapting.measures import adapter_flops, efficiency, forward_peak, preservation
from monkeyjump.mamba.adapting.stages import path_cost
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.flops import forward_flops
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.order import ChannelOrder
from tiny_mamba import batches, mamba


class Allocates(nn.Module):
    """Holds 4,000 and 4,000 bytes at once, then 4,000 and 8,000."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10_000))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return SimpleNamespace(logits=torch.cat([second, second]))


def test_the_peak_of_a_pass_is_of_what_lives_at_once() -> None:
    assert forward_peak(Allocates(), {"input_ids": torch.zeros(1, 1)}) == 12_000


def test_preservation_is_the_mean_cosine() -> None:
    masked = [torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0]]])]
    whole = [torch.tensor([[[5.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[-1.0, 0.0]]])]
    assert preservation(masked, whole) == pytest.approx((1 + math.sqrt(0.5) - 1) / 3)


def test_adapters_cost_their_product_once_a_pass() -> None:
    """B A of rank 2 on in_proj [64, 16] as torch counts it; IA³ on conv1d [32, 4] by hand."""
    model, batch = mamba(), batches(1)[0]
    names = [f"backbone.layers.0.mixer.{leaf}" for leaf in ("in_proj", "conv1d", "x_proj")]
    plan = allocate_peft(model, dict(zip(names, (3.0, 2.0, 1.0))), 0.7, 0.5, peft_r=2, peft_alpha=4)
    assert [one.kind for one in plan.modules] == ["lora", "ia3", "frozen"]
    before = forward_flops(model, *batch["input_ids"].shape).matmul
    attach_peft(model, plan, batch)
    counted = forward_flops(model, *batch["input_ids"].shape).matmul - before
    assert counted == 2 * 64 * 2 * 16
    assert adapter_flops(model, plan) == counted + 32 * 4


def test_the_score_stands_beside_its_parts() -> None:
    found = efficiency(mamba(), batches(2))
    parts = math.log(found["accuracy"]) if found["accuracy"] else -math.inf
    assert found["log_efficiency"] == pytest.approx(
        parts - math.log(found["flops_per_token"]) - math.log(found["parameters"])
    )


def test_importance_is_of_the_channels_that_masks_leave_now() -> None:
    """Gates are decided when the model runs: what was closed the moment before must not be scored."""
    model = mamba()
    groups = channel_groups(model)
    masks = attach_masks(model, MaskConfig(target_sparsity=0.5), channel_importance(model, batches(), groups))
    masks.target = 0.5
    for sign in (1, -1):  # the other half closes
        with torch.no_grad():
            for gate in masks.gates.values():
                gate.logits.copy_(sign * torch.linspace(-3, 3, gate.logits.numel()))
        scores = channel_importance(model, batches(1), channel_groups(model))
        for name, units in masks.kept().items():
            assert scores[name].nonzero().flatten().tolist() == units.tolist()


def test_the_path_cost_is_of_all_blocks_and_of_the_correlation_order_alone() -> None:
    order = ChannelOrder("correlation")
    order.update(mamba(), batches())
    cost = path_cost(order)
    assert cost is not None
    assert cost["before"] == pytest.approx(sum(block.cost_before for block in order.blocks))
    assert cost["after"] < cost["before"]
    assert cost["reduction"] == pytest.approx(1 - cost["after"] / cost["before"])
    other = ChannelOrder("identity")
    other.update(mamba())
    assert path_cost(other) is None
    assert path_cost(None) is None

"""Which modules are adapted, which are slots of which block, which are routed; and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from monkeyjump import MonkeyJumpConfig, describe_routing, record_routing
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.targets import block_of, default_targets
from tiny import bert, llama, qwen2, routed, tokens


@pytest.mark.parametrize(
    ("model", "routed_slots", "shared_slots"),
    [
        (llama, ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj")),
        (qwen2, ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj")),
        (bert, ("query", "key", "value"), ("dense",)),
    ],
)
def test_defaults_fit_the_architecture(model: object, routed_slots: tuple, shared_slots: tuple) -> None:
    plan = describe_routing(routed(model()))
    assert len(plan.blocks) == 2
    for block in plan.blocks:
        assert tuple(s.rpartition(".")[2] for s in block.routed) == routed_slots
        assert tuple(s.rpartition(".")[2] for s in block.shared) == shared_slots
    assert not plan.plain


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], r".*self_attn\.(q|v)_proj", ["self_attn.q_proj", "self_attn.v_proj"]]
)
def test_targets_by_short_name_regex_or_path(targets: list[str] | str) -> None:
    plan = describe_routing(routed(llama(), target_modules=targets))
    assert all(b.routed == ("self_attn.q_proj", "self_attn.v_proj") for b in plan.blocks)


def test_all_linear_leaves_the_head_alone() -> None:
    plan = describe_routing(routed(llama(), target_modules="all-linear"))
    assert plan.blocks[0].routed == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    assert plan.blocks[0].shared == ("self_attn.o_proj", "mlp.gate_proj")
    assert not plan.plain


def test_sharing_by_default_never_takes_the_last_expert() -> None:
    plan = describe_routing(routed(llama(), target_modules=["o_proj"]))
    assert plan.blocks[0].routed == ("self_attn.o_proj",)


def test_blocks_without_routing_keep_plain_adapters() -> None:
    model = routed(llama(), layers_to_route=[1]).eval()
    plan = describe_routing(model)
    assert [b.name for b in plan.blocks] == ["model.layers.1"]
    assert len(plan.plain) == 5
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, 32)
    plain = layer.base_layer(x) + layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
    torch.testing.assert_close(layer(x), plain)


def test_slots_follow_expert_order() -> None:
    given = describe_routing(routed(llama(), expert_order=["v_proj", "q_proj"])).blocks[0].routed
    assert given == ("self_attn.v_proj", "self_attn.q_proj", "self_attn.k_proj")
    targets = ["v_proj", "k_proj", "q_proj"]
    listed = describe_routing(routed(llama(), target_modules=targets, expert_order="targets")).blocks[0].routed
    assert listed == ("self_attn.v_proj", "self_attn.k_proj", "self_attn.q_proj")


class Towers(nn.Module):
    """Two lists of blocks of one class, and a projection outside any block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, h: Tensor) -> Tensor:
            return h + self.a(h) * self.b(h).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(self.Block() for _ in range(2))
        self.right = nn.ModuleList(self.Block() for _ in range(1))
        self.a = nn.Linear(8, 8)

    def forward(self, h: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in [*self.left, *self.right]:
            h = block(h)
        return self.a(h)


def test_any_module_with_a_module_list_can_be_routed() -> None:
    torch.manual_seed(0)
    model = routed(Towers(), target_modules=["a", "b"], shared_modules=[]).eval()
    plan = describe_routing(model)
    assert [b.name for b in plan.blocks] == ["left.0", "left.1", "right.0"]
    assert [b.routed for b in plan.blocks] == [("a", "b")] * 3
    assert [p.removeprefix("base_model.model.") for p in plan.plain] == ["a"]
    h, mask = torch.randn(2, 4, 8), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with record_routing(model) as record:
        model(h, attention_mask=mask)
    assert record.tokens == {"left.0": 7, "left.1": 7, "right.0": 7}


def test_blocks_are_the_nearest_checkpointing_layer_else_the_outermost_list_element() -> None:
    assert block_of(llama(), "model.layers.1.mlp.up_proj") == "model.layers.1"
    assert block_of(llama(), "lm_head") is None
    assert block_of(Towers(), "right.0.b") == "right.0"


def test_an_unknown_architecture_is_told_its_choices() -> None:
    with pytest.raises(ValueError, match=r"target_modules=None.*name some of: a, b"):
        default_targets(Towers())


def test_what_is_out_of_the_ordinary_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="monkeyjump"):
        routed(llama(), target_modules=["q_proj", "k_proj"], top_k=3, granularity="mean")
    messages = [r.getMessage() for r in caplog.records]
    assert "model.layers.0: routed self_attn.q_proj, self_attn.k_proj" in messages
    assert sum("fewer than top_k=3" in m and "model.layers.1" in m for m in messages) == 1
    assert sum("sees the answer in training" in m for m in messages) == 1


def test_the_record_counts_attended_tokens_only() -> None:
    model = routed(llama(), top_k=2).eval()
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    with record_routing(model) as record:
        model(ids, attention_mask=mask)
    assert set(record.tokens.values()) == {10}
    assert all(int(c.sum()) == 20 for c in record.counts.values())
    assert not any(r.observers for r in routers(model))


def test_the_plan_reads_as_text() -> None:
    config = MonkeyJumpConfig(center_init="random", layers_to_route=[0])
    text = str(describe_routing(get_peft_model(llama(), config)))
    assert text.splitlines()[:2] == [
        "1 blocks route each token among self_attn.q_proj, self_attn.k_proj, self_attn.v_proj; "
        "on every token: self_attn.o_proj, mlp.gate_proj",
        "5 adapted modules outside routed blocks",
    ]


def test_default_targets_of_a_method_without_exclude_modules() -> None:
    """VeRA's config has no such field."""
    model = routed(llama(num_key_value_heads=4), base="vera")
    assert "self_attn.q_proj" in describe_routing(model).blocks[0].routed

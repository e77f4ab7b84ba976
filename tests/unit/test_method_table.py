"""The table of methods: every formula against a real adapter's parameters, and the paper's counts against both."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from test_counts import qwen2_half_a_billion
from torch import nn

from monkeyjump.methods import METHODS, Block, Method, method
from monkeyjump.methods.paper import LLAVA_ONEVISION, VALUES, experts_of, on_the_papers_model
from tiny import LLAMA_TARGETS, llama, trainable

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
UNPRINTED = {"mixlora": 270_336, "moe-lora-fa": 737_280}  # where the paper's number has no definition


def config_of(row: Method, targets: list[str]) -> Any:
    ranks = {"r": 2, "init_r": 2, "target_r": 2, "total_step": 10}
    return row.config(
        target_modules=list(targets), num_experts="2468" if row.base == "mola" else 4, num_tasks=6, **ranks
    )


def blocks_of(base: nn.Module, targets: list[str]) -> list[Block]:
    """The shapes of the model itself, not those that the table assumes."""
    found = []
    for layer in base.model.layers:
        linear = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        shapes = {name: (linear[name].in_features, linear[name].out_features) for name in targets}
        found.append(Block(base.config.hidden_size, shapes))
    return found


def counted(row: Method, base: nn.Module, targets: list[str]) -> int:
    """Trainable parameters of a real adapter. PEFT's AdaLoRA lets its constant ranknum train where it casts it."""
    model = get_peft_model(base, config_of(row, targets))
    assert any(isinstance(module, BaseTunerLayer) for module in model.modules())
    return sum(p.numel() for name, p in trainable(model).items() if "ranknum" not in name)


def expected(row: Method, base: nn.Module, targets: list[str]) -> int:
    blocks = blocks_of(base, targets)
    return row.count(blocks, {**VALUES, "H": base.config.num_attention_heads}, experts_of(row, len(blocks)))


@pytest.mark.parametrize("name", METHODS)
def test_formula_counts_a_real_adapter(name: str) -> None:
    base = llama()
    wanted = expected(method(name), base, LLAMA_TARGETS)
    assert counted(method(name), base, LLAMA_TARGETS) == wanted > 0


@pytest.mark.parametrize("name", METHODS)
def test_formula_counts_the_papers_model(name: str) -> None:
    base = qwen2_half_a_billion()
    assert blocks_of(base, ATTENTION) == list(LLAVA_ONEVISION)
    wanted = expected(method(name), base, ATTENTION)
    total = counted(method(name), base, ATTENTION)
    assert on_the_papers_model(method(name)) == wanted == total
    reported = method(name).reported
    if name in UNPRINTED:
        assert total == UNPRINTED[name]
        assert round(total / 1000) != reported
    elif reported is not None:
        assert round(total / 1000) == reported


def test_names_are_their_rows() -> None:
    assert all(name == row.name for name, row in METHODS.items())
    assert len({(row.base, row.routed, *row.options.items()) for row in METHODS.values()}) == len(METHODS)
    with pytest.raises(ValueError, match="method='moelroa' is not known: did you mean 'moelora'"):
        method("moelroa")


def test_a_difference_to_the_papers_table_is_explained() -> None:
    for row in METHODS.values():
        assert bool(row.remarks) == (row.paper is not None and row.paper != row.cost), row.name

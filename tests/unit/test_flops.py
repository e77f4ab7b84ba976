"""Floating-point operations of a forward pass, against counts by hand.

2 rows of 12 tokens. The tiny Mambas have 64 channels in all: two layers of 32, 4 states, 4 taps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.flops import Flops, forward_flops
from monkeyjump.mamba.masks import MaskConfig, attach_masks
from monkeyjump.mamba.shrink import shrink
from tiny_mamba import HYBRIDS, hybrid, mamba, mamba2, plain_llama

ROWS, LENGTH = 2, 12
TOKENS = ROWS * LENGTH


def linears(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def attention(width: int) -> int:
    """q k^T and its product with v, for heads of `width` in all."""
    return 2 * 2 * ROWS * LENGTH**2 * width


def test_mamba() -> None:
    model = mamba()
    assert forward_flops(model, ROWS, LENGTH) == Flops(
        matmul=2 * TOKENS * linears(model),
        convolution=2 * 4 * 64 * TOKENS,
        scan=7 * 4 * 64 * TOKENS,
        elementwise=5 * 64 * TOKENS,
    )


def test_mamba2() -> None:
    model = mamba2()
    assert forward_flops(model, ROWS, LENGTH) == Flops(
        matmul=2 * TOKENS * linears(model),
        convolution=2 * 4 * 2 * (32 + 2 * 2 * 4) * TOKENS,
        scan=5 * 4 * 64 * TOKENS,
        elementwise=5 * 64 * TOKENS,
    )


def test_a_model_without_mixers() -> None:
    model = plain_llama()
    assert forward_flops(model, ROWS, LENGTH).total == 2 * TOKENS * linears(model) + 2 * attention(4 * 8)


def test_masks_are_not_credited_and_shrinking_is() -> None:
    model = mamba()
    dense = forward_flops(model, ROWS, LENGTH)
    attach_masks(model, MaskConfig(kind="element", target_sparsity=0.9)).remove(bake=True)
    assert forward_flops(model, ROWS, LENGTH) == dense
    half = {name: torch.arange(16) for name in channel_groups(model)}
    small = forward_flops(shrink(model, half), ROWS, LENGTH)
    per_channel = 2 * 16 + (3 + 2 * 4) + 3 + 16  # in, x, dt, out
    assert dense.matmul - small.matmul == 2 * TOKENS * 32 * per_channel
    assert (small.scan, small.elementwise) == (dense.scan // 2, dense.elementwise // 2)


def swiglu(width: int) -> int:
    return 3 * 16 * width


# By hybrid: what a token is multiplied by outside of nn.Linear, and the attention's products.
BESIDE = {
    "jamba": (16 * 2 + swiglu(24), attention(16)),  # one layer with a router and 1 of 2 experts
    "zamba": (3 * 2 * (3 + 2 * 4 + 3) * 16, 2 * attention(32)),  # 3 mixers select by 2 heads of 16: x_proj, dt_proj
    "bamba": (0, attention(16)),
    "zamba2": (0, 2 * attention(32)),
    "granitemoehybrid": (2 * (16 * 3 + 2 * swiglu(24)), attention(16)),  # two layers with a router and 2 of 3 experts
    "nemotron_h": (0, attention(256)),
    "falcon_h1": (0, 2 * attention(16)),
    "falcon_h1_normed": (0, 2 * attention(16)),
}
MIXERS = {"zamba": 3, "zamba2": 3, "falcon_h1": 2, "falcon_h1_normed": 2}  # else 1, of 32 channels and 4 states


@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids(kind: str) -> None:
    model, called = hybrid(kind), []

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        called.append(2 * output.numel() * module.weight.shape[1])

    for module in model.modules():  # Zamba calls its shared blocks more than once
        if isinstance(module, nn.Linear):
            module.register_forward_hook(hook)
    experts, classes = model.get_experts_implementation(), [type(module) for module in model.modules()]
    found = forward_flops(model, ROWS, LENGTH)
    per_token, scores = BESIDE[kind]
    channels = 32 * MIXERS.get(kind, 1)
    second = kind not in ("jamba", "zamba")
    convolved = 3 * channels // 2 if second else channels  # with B and C, 2 groups of 4 states
    assert found == Flops(
        matmul=sum(called) + 2 * TOKENS * per_token + scores,
        convolution=2 * 4 * convolved * TOKENS,
        scan=(5 if second else 7) * 4 * channels * TOKENS,
        elementwise=5 * channels * TOKENS,
    )
    assert model.get_experts_implementation() == experts
    assert [type(module) for module in model.modules()] == classes

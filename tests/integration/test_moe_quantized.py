"""Mixtures on bases whose weights are packed integers; the reference is the dense base of the same values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from test_quantized import PackedLinear, bitsandbytes_model, dense_of, replaced
from torch import Tensor, nn

from moe_methods import METHODS, mixture, told
from tiny import llama, tokens, trainable

every_mixture = pytest.mark.parametrize("name", METHODS)


def packed() -> Any:
    return replaced(llama(), PackedLinear.of)


def step(model: PeftModel) -> dict[str, Tensor]:
    """Loss and gradients of one training forward."""
    ids = tokens()
    loss = model.train()(input_ids=ids, labels=ids, **told(model, ids)).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in trainable(model).items()}}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(), **told(model, tokens())).logits


@every_mixture
def test_packed_base_trains_like_the_dense_one(name: str) -> None:
    dense = replaced(packed(), lambda p: dense_of(p, PackedLinear.dense_weight))
    expected, found = step(mixture(name, dense)), step(mixture(name, packed()))
    assert all(value.any() for value in found.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@every_mixture
def test_dtype_comes_from_the_activation(name: str) -> None:
    model = mixture(name, packed().to(torch.bfloat16))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in step(model).values())


@pytest.mark.parametrize("bits", [8, 4])
@every_mixture
def test_bitsandbytes_base_takes_a_mixture(name: str, bits: int) -> None:
    model, plain = mixture(name, bitsandbytes_model(bits)).train(), bitsandbytes_model(bits)
    assert not torch.allclose(logits(model), logits(plain), atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))
    assert all(value.any() for value in step(model).values())
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model.unload()), logits(plain))

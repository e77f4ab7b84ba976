"""Bases whose weights are packed integers: adapters take their dtype from the activation, never from the weight.

The reference is the same adapter on a dense base that holds the dequantized weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from monkeyjump import CenterUpdate, PropulsionConfig, initialize_centers
from monkeyjump.tuner.model import routers
from tiny import LLAMA_TARGETS, llama, position_dependent, routed, tokens, trainable

ARGUMENTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_fa": {},
    "adalora": {"total_step": 10},
    "propulsion": {},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "vera": {},
}
every_base = pytest.mark.parametrize("base", list(ARGUMENTS))


class PackedLinear(nn.Linear):
    """A frozen linear layer that keeps two 4-bit numbers in each byte: weight uint8 `[d_out, d_in / 2]`."""

    @classmethod
    def of(cls, dense: nn.Linear) -> PackedLinear:
        packed = cls(dense.in_features, dense.out_features, bias=False)
        packed.scale = float(dense.weight.detach().abs().max()) / 7
        levels = (dense.weight.detach() / packed.scale).round().clamp(-7, 7).to(torch.int16) + 8
        packed.weight = nn.Parameter((levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8), requires_grad=False)
        return packed

    def dense_weight(self) -> Tensor:
        levels = torch.stack([self.weight // 16, self.weight % 16], dim=-1).flatten(1)
        return (levels.float() - 8) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight().to(x.dtype))


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """The model with other projections in its blocks."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
    return model


def dense_of(packed: nn.Linear, dequantize: Callable[[Any], Tensor]) -> nn.Linear:
    dense = nn.Linear(packed.in_features, packed.out_features, bias=False)
    dense.weight = nn.Parameter(dequantize(packed), requires_grad=False)
    return dense


def adapted(base_model: nn.Module, base: str, **changes: Any) -> PeftModel:
    """Routed adapters (o and gate shared) that differ from their start in every element."""
    settings = {"base": base, "target_modules": list(LLAMA_TARGETS), **ARGUMENTS[base], **changes}
    model = routed(base_model, **settings)
    position_dependent(trainable(model).values(), size=0.05)
    return model


def packed_model(base: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    return adapted(replaced(llama(), PackedLinear.of).to(dtype), base, **changes)


def step(model: PeftModel) -> dict[str, Tensor]:
    """Loss, gradients and statistics of one training forward."""
    schedule = CenterUpdate(every=9, until=9)
    schedule.attach(model, torch.optim.SGD(trainable(model).values(), lr=0.0), total_steps=10)
    loss = model.train()(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    found = {"loss": loss.detach(), **{n: p.grad for n, p in trainable(model).items()}}
    return {**found, **{r.name: r.pending["default"].sums for r in routers(model)}}


def layer_at(model: PeftModel, slot: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.1.{slot}")


@pytest.mark.proves("integration", "packed uint8 weights")
@every_base
def test_packed_base_trains_like_the_dense_one(base: str) -> None:
    quantized = replaced(llama(), PackedLinear.of)
    dense = replaced(replaced(llama(), PackedLinear.of), lambda p: dense_of(p, PackedLinear.dense_weight))
    expected, found = step(adapted(dense, base)), step(adapted(quantized, base))
    assert {m.weight.dtype for m in quantized.modules() if isinstance(m, PackedLinear)} == {torch.uint8}
    assert all(value is not None and value.any() for value in found.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@every_base
@pytest.mark.parametrize("slot", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_routed_and_shared_adapters_act_on_a_packed_layer(base: str, slot: str) -> None:
    model = packed_model(base).eval()
    layer, router = layer_at(model, slot), routers(model)[1]
    is_routed = slot in router.slots["default"]
    assert is_routed == (slot == "self_attn.q_proj")
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(5))
    of_base = layer.get_base_layer()(x)
    outputs = []
    for gate in (0.0, 1.0):
        router.box.gates = {"default": torch.full((2, 7, len(router.slots["default"])), gate)}
        outputs.append(layer(x))
    router.box.gates = None
    assert (outputs[1] - of_base).abs().max() > 1e-3
    assert torch.equal(outputs[0], of_base if is_routed else outputs[1])


@every_base
def test_checkpointing_on_a_packed_base_changes_nothing(base: str) -> None:
    model = packed_model(base)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.testing.assert_close(step(model), step(packed_model(base)))


@every_base
def test_dtype_comes_from_the_activation(base: str) -> None:
    everywhere = {"top_k": 7}  # rounding decides nothing
    model = packed_model(base, torch.bfloat16, **everywhere)
    adapters = {p.dtype for p in trainable(model).values()}
    assert adapters == {torch.float32}
    output = model.train()(input_ids=tokens(), labels=tokens())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model).values())
    with torch.no_grad():
        exact = packed_model(base, **everywhere)(input_ids=tokens()).logits
        torch.testing.assert_close(model.eval()(input_ids=tokens()).logits.float(), exact, rtol=0, atol=0.1)


def test_centers_are_fitted_on_a_packed_base() -> None:
    model = packed_model("lora", center_init="kmeans", task_type="CAUSAL_LM")
    initialize_centers(model, [{"input_ids": tokens(4, 12)}], progress=False)
    assert step(model)["loss"].isfinite()


def test_propulsion_refuses_to_merge_into_packed_weights() -> None:
    config = PropulsionConfig(target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(replaced(llama(), PackedLinear.of), config)
    before = model(tokens()).logits
    with pytest.raises(ValueError, match=r"keeps its weight as torch\.uint8"):
        model.merge_adapter()
    assert torch.equal(model(tokens()).logits, before)


# ---------------------------------------------------------------------- bitsandbytes

SIZE = {"hidden_size": 64, "intermediate_size": 128}  # its 4-bit blocks hold 64 values


def eight_bits(dense: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(dense.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


def four_bits(dense: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(dense.weight.data.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def bitsandbytes_model(bits: int) -> Any:
    model = replaced(llama(**SIZE), four_bits if bits == 4 else eight_bits)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # as transformers marks what it has quantized
    return model.train()  # in evaluation mode 4-bit layers on a CPU repack themselves, and then have no backward


@pytest.mark.proves("integration", "bitsandbytes, 8 and 4 bits")
@pytest.mark.parametrize("base", ["lora", "lora_fa", "adalora", "propulsion", "ia3"])
@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_base_takes_routed_and_shared_adapters(bits: int, base: str) -> None:
    model = adapted(bitsandbytes_model(bits), base)
    plain = bitsandbytes_model(bits)
    ids = tokens()
    assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    for slot in ("self_attn.q_proj", "self_attn.o_proj"):
        layer, router = layer_at(model, slot), routers(model)[1]
        x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(5))
        with router.box.showing({"default": torch.ones(2, 7, len(router.slots["default"]))}):
            assert (layer(x) - layer.get_base_layer()(x)).abs().max() > 1e-3
    assert all(value is not None and value.any() for value in step(model).values())


@pytest.mark.parametrize("bits", [8, 4])
def test_prepared_bitsandbytes_base_is_checkpointed(bits: int) -> None:
    gradients = []
    for checkpointing in (False, True):
        base = bitsandbytes_model(bits)
        settings = {"use_reentrant": False}
        base = prepare_model_for_kbit_training(base, checkpointing, settings)
        gradients.append(step(adapted(base, "lora")))
    torch.testing.assert_close(gradients[1], gradients[0])

"""Several adapters, variants and merges in one routed layer."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from monkeyjump import MonkeyJumpConfig, record_routing
from tiny import llama, routed, tokens

LORA = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False, "center_init": "random"}


def added(model: PeftModel, gate: float) -> Tensor:
    """What the first block's q_proj adds for a gate of this value."""
    block = model.get_base_model().model.layers[0]
    layer, x = block.self_attn.q_proj, torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    gates = {name: torch.full((1, 5, 3), gate) for name in layer.active_adapters}
    with block.jump_router.box.showing(gates):
        return layer(x) - layer.get_base_layer()(x)


@pytest.mark.parametrize("dora_first", [False, True])
def test_dora_and_plain_lora_in_one_layer_are_each_gated_once(dora_first: bool) -> None:
    torch.manual_seed(0)
    configs = [MonkeyJumpConfig(**LORA, use_dora=dora) for dora in (dora_first, not dora_first)]
    model = routed(llama(), use_dora=dora_first).eval()
    alone = model(tokens()).logits
    model.add_adapter("second", configs[1])
    torch.testing.assert_close(model.eval()(tokens()).logits, alone)
    for name in ("default", "second"):
        model.set_adapter(name)
        torch.testing.assert_close(added(model, 0.5), 0.5 * added(model, 1.0), atol=1e-6, rtol=1e-4)


def test_a_method_that_cannot_tell_two_active_adapters_apart_says_so() -> None:
    model = routed(llama(), base="loha", target_modules=["q_proj", "k_proj"], shared_modules=[])
    shares = MonkeyJumpConfig(base="loha", target_modules=["q_proj", "k_proj"], shared_modules=["q_proj"])
    shares.center_init = "random"
    model.add_adapter("second", shares)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] are active at once"):
        model(tokens())


def test_two_active_lora_adapters_add_up_under_their_own_gates() -> None:
    model = routed(llama()).eval()
    model.add_adapter("second", MonkeyJumpConfig(**{**LORA, "center_seed": 3}))
    single = []
    for name in ("default", "second"):
        model.set_adapter(name)
        single.append(added(model.eval(), 0.7))
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(added(model.eval(), 0.7), sum(single), atol=1e-6, rtol=1e-4)
    with record_routing(model, "second") as record:
        model(tokens())
    assert set(record.tokens.values()) == {18}


@pytest.mark.parametrize("base", ["lora", "lora_fa", "adalora", "propulsion", "loha"])
def test_merging_a_single_routed_layer_is_refused(base: str) -> None:
    extra = {"total_step": 4} if base == "adalora" else {}
    model = routed(llama(), base=base, target_modules=["q_proj", "k_proj"], **extra).eval()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj

    def merge_and_use() -> None:
        layer.merge()  # the methods of our own refuse here, PEFT's at their next forward
        model(tokens())

    with pytest.raises(ValueError, match="routed adapters cannot be merged"):
        merge_and_use()


def test_siblings_that_read_the_same_input_share_one_dropout_mask() -> None:
    """Rule 8: q and k read one input and share its mask; o reads another."""
    model = routed(llama(), target_modules=["q_proj", "k_proj", "o_proj"], lora_dropout=0.5).train()
    box, masks = model.get_base_model().model.layers[0].jump_router.box, []
    original = box.dropout_mask
    box.dropout_mask = lambda x, p: masks.append(original(x, p)) or masks[-1]
    model(tokens())
    assert len(masks) == 3
    assert masks[0] is masks[1]
    assert not torch.equal(masks[1].bits, masks[2].bits)


def test_alora_leaves_the_tokens_before_its_invocation_alone() -> None:
    """PEFT hands the offsets on through the tuner's own forward hooks."""
    model = routed(llama(), task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8]).eval()
    ids = torch.tensor([[3, 4, 5, 7, 8, 9, 10]])
    with model.disable_adapter():
        bare = model(input_ids=ids).logits
    routed_logits = model(input_ids=ids).logits
    torch.testing.assert_close(routed_logits[:, :3], bare[:, :3])
    assert not torch.allclose(routed_logits[:, 3:], bare[:, 3:])

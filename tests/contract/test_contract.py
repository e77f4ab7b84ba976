"""What routing promises for every method of PEFT that it takes, on a tiny Llama.

What a method itself cannot do (two adapters, pickle, bfloat16 on a CPU) is learned from its plain
adapters at run time: the routed ones may then fail in the same way and in no other.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft_methods import CORE, SHARED, methods, plain_config, plain_model, routed_config, routed_model
from safetensors.torch import load_file
from torch import Tensor, nn

from monkeyjump import CenterUpdate
from monkeyjump.tuner.block import RoutedBlock
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.router import Router
from tiny import VOCAB, left_padded, llama, position_dependent, tokens, trainable

every_method = pytest.mark.parametrize("base", methods())
# what proves a method for `monkeyjump methods --routed`: the promises that plain adapters keep, too
proves_method = pytest.mark.parametrize(
    "base", [pytest.param(base, marks=pytest.mark.proves("method", base)) for base in methods()]
)
# for expensive promises: the four of the paper always, the other methods in the slow run
core_first = pytest.mark.parametrize(
    "base", [base if base in CORE else pytest.param(base, marks=pytest.mark.slow) for base in methods()]
)


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": tokens()})).logits


def loss_of(model: nn.Module, seed: int = 3) -> Tensor:
    ids = tokens(seed=seed)
    return model(input_ids=ids, labels=ids).loss


def unless_plain_fails(base: str, action: Callable[[PeftModel], Any]) -> None:
    """Skip the test where the method's plain adapters do not get through `action` either."""
    model = plain_model(base)
    try:
        action(model)
    except Warning:
        raise  # a warning is no inability
    except Exception as error:
        pytest.skip(f"plain {base} cannot do it: {type(error).__name__}: {str(error)[:80]}")


def layer_at(model: nn.Module, slot: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.1.{slot}")


# ---------------------------------------------------------------------- parameters and gates


@proves_method
def test_routing_adds_no_trainable_parameter(base: str) -> None:
    plain, routed = trainable(plain_model(base)), trainable(routed_model(base))
    assert {n: p.shape for n, p in routed.items()} == {n: p.shape for n, p in plain.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_counters_of_adalora_never_train(dtype: torch.dtype) -> None:
    # plain AdaLoRA trains them on a bfloat16 base, and they divide what the adapter adds
    assert not [name for name in trainable(routed_model("adalora", llama().to(dtype))) if "ranknum" in name]


@proves_method
@pytest.mark.parametrize("slot", ["self_attn.q_proj", "mlp.down_proj"])
def test_gate_scales_what_the_plain_adapter_adds(base: str, slot: str) -> None:
    routed, plain = routed_model(base), plain_model(base).eval()
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".jump_router." not in k})
    router, layer = routers(routed)[1], layer_at(routed, slot)
    number = router.slots["default"].index(slot)
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(5))

    def gated(gate: Tensor) -> Tensor:
        """The layer's output under `gate` `[2, 7]`, while all other slots get other gates."""
        everyone = torch.rand(2, 7, len(router.slots["default"]))
        everyone[..., number] = gate
        router.box.gates = {"default": everyone}
        try:
            return layer(x)
        finally:
            router.box.gates = None

    with torch.no_grad():
        of_base, of_plain = layer.get_base_layer()(x), layer_at(plain, slot)(x)
        added = of_plain - of_base
        assert added.abs().max() > 1e-3
        tolerance = 1e-5 * float(of_plain.abs().max())
        assert torch.equal(gated(torch.zeros(2, 7)), of_base)
        torch.testing.assert_close(gated(torch.ones(2, 7)), of_plain, rtol=0, atol=tolerance)
        m = torch.rand(2, 7, generator=torch.Generator().manual_seed(6))
        torch.testing.assert_close(gated(m), of_base + m[..., None] * added, rtol=0, atol=tolerance)


@every_method
def test_shared_adapter_acts_in_full_whatever_the_gates(base: str) -> None:
    routed, plain = routed_model(base), plain_model(base).eval()
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".jump_router." not in k})
    slot = f"self_attn.{SHARED[0]}"
    router, layer = routers(routed)[1], layer_at(routed, slot)
    x = torch.randn(2, 7, layer.in_features, generator=torch.Generator().manual_seed(5))
    assert slot not in router.slots["default"]
    router.box.gates = {"default": torch.zeros(2, 7, len(router.slots["default"]))}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer_at(plain, slot)(x), rtol=1e-4, atol=1e-5)


@proves_method
def test_training_step_reaches_every_adapter_with_a_gate(base: str) -> None:
    routed, plain = routed_model(base, top_k=6), plain_model(base)
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".jump_router." not in k})
    reached = []
    for model in (plain, routed):
        model.train()
        loss_of(model).backward()
        reached.append({n for n, p in trainable(model).items() if p.grad is not None and p.grad.any()})
    assert reached[0]
    assert reached[1] == reached[0]


@every_method
def test_adapters_without_a_token_still_have_gradients(base: str) -> None:
    # DDP waits for every parameter: none may leave the graph because no token came its way
    routed, plain = routed_model(base, top_k=1), plain_model(base)
    for router in routers(routed):
        router.set_centers("default", torch.ones(6, 32))  # ties go to slot 0: the others get nothing
    for model in (plain, routed):
        model.train()
        loss_of(model).backward()
    missing = {n for n, p in trainable(plain).items() if p.grad is None}
    assert {n for n, p in trainable(routed).items() if p.grad is None} == missing


# ---------------------------------------------------------------------- saving and loading


@proves_method
@pytest.mark.parametrize("low_memory", [False, True])
def test_loaded_adapter_gives_the_same_logits(base: str, low_memory: bool, tmp_path: Path) -> None:
    model = routed_model(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert not torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(loaded), logits(model))
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in saved.items()}


@every_method
def test_centers_stand_in_the_safetensors_file(base: str, tmp_path: Path) -> None:
    model = routed_model(base)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    centers = [value for name, value in saved.items() if name.endswith("jump_router.centers")]
    assert len(centers) == 2
    assert all(torch.equal(value, r.centers["default"]) for value, r in zip(centers, routers(model)))


@every_method
def test_saved_config_keeps_the_routing(base: str, tmp_path: Path) -> None:
    routing = {"top_k": 1, "temperature": 0.5, "expert_order": ["down_proj", "q_proj"], "gate_norm": "none"}
    model = routed_model(base, **routing)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert {name: getattr(loaded.peft_config["default"], name) for name in routing} == routing
    assert [r.slots for r in routers(loaded)] == [r.slots for r in routers(model)]
    assert routers(loaded)[0].slots["default"][:2] == ("mlp.down_proj", "self_attn.q_proj")


# ---------------------------------------------------------------------- several adapters, on and off


def second_adapter(model: PeftModel, config: Any) -> list[Tensor]:
    """Logits of the first adapter, of the second, of the first again, and after deleting the second."""
    seen = [logits(model)]
    model.add_adapter("second", config)
    model.set_adapter("second")
    position_dependent(trainable(model).values())
    seen.append(logits(model))
    model.set_adapter("default")
    seen.append(logits(model))
    model.delete_adapter("second")
    return [*seen, logits(model)]


@every_method
def test_second_adapter_comes_and_goes_without_a_trace(base: str) -> None:
    unless_plain_fails(base, lambda plain: second_adapter(plain.eval(), plain_config(base)))
    model = routed_model(base)
    other = routed_config(base, top_k=1, shared_modules=["down_proj"], granularity="last")
    first, second, again, after = second_adapter(model, other)
    assert not torch.equal(second, first)
    assert torch.equal(again, first)
    assert torch.equal(after, first)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            kept = [getattr(module, n) for n in (*module.adapter_layer_names, *module.other_param_names)]
            assert not any("second" in one for one in kept if isinstance(one, (dict, nn.Module)))
            assert "second" not in module.__dict__.get("jump_gates", {})


def second_from(folder: Path, model: PeftModel, name: str = "default2") -> PeftModel:
    """The model with another adapter from a folder, active; one name is part of the other."""
    model.load_adapter(folder, adapter_name=name)
    model.set_adapter(name)
    return model.eval()


@every_method
def test_second_adapter_loads_beside_the_first(base: str, tmp_path: Path) -> None:
    plain_model(base).save_pretrained(tmp_path / "plain")
    unless_plain_fails(base, lambda plain: second_from(tmp_path / "plain", plain))
    model, other = routed_model(base), routed_model(base, center_seed=5, top_k=1)
    other.save_pretrained(tmp_path / "routed")
    before = logits(model)
    both = second_from(tmp_path / "routed", model)
    assert torch.equal(logits(both), logits(other))
    both.set_adapter("default")
    assert torch.equal(logits(both), before)
    both.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "both").eval()), before)
    again = PeftModel.from_pretrained(llama(), tmp_path / "both" / "default2").eval()
    assert torch.equal(logits(again), logits(other))


def rows_alone_and_mixed(model: PeftModel, config: Any) -> tuple[Tensor, Tensor]:
    """Logits of rows of several adapters, each computed with its adapter active, and all in one batch."""
    names, inputs = ["second", "default", "__base__", "second"], {"input_ids": tokens(4, 6)}
    model.add_adapter("second", config)
    alone = {"__base__": logits(llama(), **inputs)}
    for number, name in enumerate(("second", "default")):
        model.set_adapter(name)
        position_dependent(trainable(model).values(), size=0.1 + 0.05 * number)
        alone[name] = logits(model.eval(), **inputs)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    return expected, logits(model, **inputs, adapter_names=names)


def close(alone: Tensor, mixed: Tensor) -> None:
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-6)


@every_method
def test_mixed_batch_gives_every_row_its_adapter_or_is_refused(base: str) -> None:
    routed, other = routed_model(base), routed_config(base, top_k=1, center_seed=5)
    try:  # some plain methods refuse, some ignore the names in silence
        close(*rows_alone_and_mixed(plain_model(base), plain_config(base)))
    except (AssertionError, TypeError, ValueError):
        with pytest.raises(ValueError, match=r"adapter_names=.*one adapter per batch|only 1 trainable adapter"):
            rows_alone_and_mixed(routed, other)
    else:
        close(*rows_alone_and_mixed(routed, other))


@every_method
def test_deleted_adapter_leaves_nothing_that_runs(base: str) -> None:
    def second_alone(model: PeftModel, config: Any) -> Tensor:
        model.add_adapter("second", config)
        model.set_adapter("second")
        model.delete_adapter("default")
        return loss_of(model.train())

    unless_plain_fails(base, lambda plain: second_alone(plain, plain_config(base, inference_mode=True)))
    assert second_alone(routed_model(base), routed_config(base, inference_mode=True)).isfinite()


@every_method
def test_disabled_adapter_is_the_base_model_bit_for_bit(base: str) -> None:
    model = routed_model(base)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)


@every_method
def test_unload_gives_the_base_model_back(base: str) -> None:
    model = routed_model(base)
    logits(model)
    left, fresh = model.unload(), llama()
    assert torch.equal(logits(left), logits(fresh))
    assert [(n, type(m)) for n, m in left.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    assert not any(getattr(m, kind) for m in left.modules() for kind in hooks)
    assert not any(isinstance(m, (Router, RoutedBlock)) for m in left.modules())


@every_method
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_equal_and_shares_nothing(base: str, copied: Callable[[PeftModel], PeftModel]) -> None:
    unless_plain_fails(base, copied)
    model = routed_model(base)
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    mine, its = ({t.data_ptr() for t in m.state_dict().values() if t.numel()} for m in (model, twin))
    assert not mine & its
    assert not {id(r.box) for r in routers(model)} & {id(r.box) for r in routers(twin)}
    for router in routers(twin):
        router.set_centers("default", -router.centers["default"])
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


@every_method
def test_merging_is_refused_with_its_reason(base: str) -> None:
    model = routed_model(base)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged: which of them act differs .* unload\(\)"):
            merge()
    assert torch.equal(logits(model), before)


# ---------------------------------------------------------------------- precision


def bfloat16_before(base: str, build: Callable[..., PeftModel]) -> PeftModel:
    return build(base, llama().to(torch.bfloat16))


def bfloat16_after(base: str, build: Callable[..., PeftModel]) -> PeftModel:
    return build(base).to(torch.bfloat16)


@every_method
@pytest.mark.parametrize("halved", [bfloat16_before, bfloat16_after])
def test_centers_stay_float32_in_a_bfloat16_model(base: str, halved: Callable[..., PeftModel]) -> None:
    centers = [r.centers["default"] for r in routers(routed_model(base))]
    model = halved(base, routed_model)
    for router, exact in zip(routers(model), centers):
        assert router.centers["default"].dtype == torch.float32
        assert torch.equal(router.centers["default"], exact)
    unless_plain_fails(base, lambda plain: loss_of(plain.to(torch.bfloat16)).backward())
    model.train()
    loss = loss_of(model)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trainable(model).values() if p.grad is not None)


@every_method
def test_bfloat16_autocast_is_close(base: str) -> None:
    def autocast(model: PeftModel) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        return loss

    unless_plain_fails(base, autocast)
    model = routed_model(base)
    torch.testing.assert_close(autocast(model), loss_of(model), rtol=0.02, atol=0)


# ---------------------------------------------------------------------- checkpointing and generation


def step(model: PeftModel, forwards: int) -> tuple[float, dict[str, Tensor], list[Tensor]]:
    """Loss, gradients and gathered statistics of `forwards` forwards before one backward."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    CenterUpdate(every=100, until=100).attach(model, optimizer)
    model.train()
    torch.manual_seed(7)  # the same dropout
    loss = sum(loss_of(model, seed) for seed in range(forwards))
    loss.backward()
    gradients = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
    statistics = [t for r in routers(model) for s in [r.pending["default"]] for t in (s.sums, s.counts)]
    return float(loss.detach()), gradients, statistics


@core_first
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_changes_nothing(base: str, reentrant: bool, forwards: int) -> None:
    def checkpointed(model: PeftModel) -> PeftModel:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    unless_plain_fails(base, lambda plain: loss_of(checkpointed(plain).train()).backward())
    expected = step(routed_model(base), forwards)
    found = step(checkpointed(routed_model(base)), forwards)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2]))


@core_first
def test_left_padded_generation_equals_the_rows_alone(base: str) -> None:
    model = routed_model(base)
    rows = [tokens(1, length, seed=length) for length in (3, 6, 9)]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    together = model.generate(**left_padded(rows), **settings)[:, -5:]
    alone = [model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings) for row in rows]
    assert together.tolist() == [one[0, -5:].tolist() for one in alone]

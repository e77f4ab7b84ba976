"""What every mixture promises, on a tiny Llama: the promises of test_contract.py, with learned routers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from test_contract import logits
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from moe_methods import METHODS, mixture, mixture_config, silent, told
from monkeyjump import MonkeyJumpConfig
from monkeyjump.moe.module import ExpertModule
from tiny import VOCAB, left_padded, llama, position_dependent, tokens, trainable

every_mixture = pytest.mark.parametrize("name", METHODS)
# one trainable adapter is all that a rank schedule can serve: the second is for inference
SECOND = {"moe_adalora": {"inference_mode": True}}


def loss_of(model: nn.Module, seed: int = 3) -> Tensor:
    ids = tokens(seed=seed)
    return model(input_ids=ids, labels=ids, **told(model, ids)).loss


def layers(model: nn.Module) -> list[ExpertModule]:
    return [module for module in model.modules() if isinstance(module, ExpertModule)]


def routers_of(model: nn.Module) -> list[nn.Parameter]:
    """The routers' weights: one per projection, per feed-forward network or per block."""
    found = [module.mixture_router["default"] for module in layers(model) if "default" in module.mixture_router]
    assert len(found) in (2, 14)  # of a Llama of two blocks with seven projections each
    return found


# ---------------------------------------------------------------------- saving and loading


@every_mixture
@pytest.mark.parametrize("low_memory", [False, True])
def test_loaded_adapter_gives_the_same_logits(name: str, low_memory: bool, tmp_path: Path) -> None:
    model = mixture(name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert not torch.equal(logits(model), logits(llama()))
    # weights that stay where the file was mapped lie at other addresses, at which a BLAS may round otherwise
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6 if low_memory else 0)
    saved, again = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in saved.items()}
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    assert "import monkeyjump" in (tmp_path / "README.md").read_text()


@every_mixture
def test_file_holds_every_weight_and_routers_in_float32(name: str, tmp_path: Path) -> None:
    model = mixture(name, llama().to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    routers = [value for key, value in saved.items() if key.endswith("mixture_router")]
    assert len(routers) == len(routers_of(model))
    assert all(value.dtype == torch.float32 for value in routers)
    own = sum(p.numel() for n, p in model.named_parameters() if "mixture_" in n)  # frozen A of LoRA-FA too
    assert sum(value.numel() for value in saved.values()) == own


@every_mixture
def test_file_that_does_not_fit_is_refused_by_name(name: str, tmp_path: Path) -> None:
    mixture(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the adapter does not fit this base model: .* is missing"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path)


# ---------------------------------------------------------------------- several adapters, on and off


@every_mixture
def test_second_adapter_comes_and_goes_without_a_trace(name: str) -> None:
    model = mixture(name)
    first = logits(model)
    another = {"num_experts": 3} if mixture_config(name).num_experts else {"r": 4}
    model.add_adapter("second", mixture_config(name, **another, **SECOND.get(name, {})))
    model.set_adapter("second")
    position_dependent((p for n, p in model.named_parameters() if n.endswith(".second")), size=0.05)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    for layer in layers(model):
        kept = [getattr(layer, n) for n in (*layer.adapter_layer_names, *layer.other_param_names)]
        assert not any("second" in one for one in kept)
    assert model.base_model.auxiliary.terms.keys() == {"default"}


@every_mixture
def test_second_adapter_loads_beside_the_first(name: str, tmp_path: Path) -> None:
    model, other = mixture(name), mixture(name)
    position_dependent(trainable(other).values(), size=0.03)
    other.save_pretrained(tmp_path / "other")
    before = logits(model)
    model.load_adapter(tmp_path / "other", adapter_name="default2")
    model.set_adapter("default2")
    assert torch.equal(logits(model.eval()), logits(other))
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(llama(), tmp_path / "both" / "default2").eval()
    assert torch.equal(logits(again), logits(other))


@every_mixture
@pytest.mark.parametrize("narrow_first", [True, False])
def test_adapters_of_different_configs_keep_to_themselves(name: str, narrow_first: bool) -> None:
    narrow: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
    if "r" in METHODS[name][1]:
        narrow["r"] = 5
    if mixture_config(name).num_experts:
        narrow |= {"num_experts": 3, "top_k": 1}
    first, second = (narrow, {}) if narrow_first else ({}, narrow)
    model, alone = mixture(name, **first), mixture(name, **second)
    before = logits(model)
    model.add_adapter("second", mixture_config(name, **second, **SECOND.get(name, {})))
    own = {n.replace(".second", ".default"): p for n, p in model.named_parameters() if n.endswith(".second")}
    values = {n: p for n, p in alone.named_parameters() if n.endswith(".default")}
    assert own.keys() == values.keys()
    for key, parameter in own.items():
        parameter.data.copy_(values[key])
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(alone))
    torch.testing.assert_close(loss_of(model.train()), loss_of(alone.train()), rtol=0, atol=0)
    assert model.auxiliary_losses() == alone.auxiliary_losses()
    model.delete_adapter("default")
    assert torch.equal(logits(model.eval()), logits(alone.eval()))


def test_adapter_of_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        mixture("moelora").add_adapter("second", mixture_config("hydralora"))


def test_second_trainable_rank_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"supports only 1 trainable adapter, .* set inference_mode=True"):
        mixture("moe_adalora").add_adapter("second", mixture_config("moe_adalora"))


@every_mixture
def test_batch_of_several_adapters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"adapter_names=\['default'.* one adapter per batch; use set_adapter"):
        logits(mixture(name), input_ids=tokens(), adapter_names=["default", "default"])


@every_mixture
def test_disabled_adapter_is_the_base_model_bit_for_bit(name: str) -> None:
    model = mixture(name)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(logits(model), before)


@every_mixture
def test_unload_gives_the_base_model_back(name: str) -> None:
    model = mixture(name)
    logits(model)
    left, fresh = model.unload(), llama()
    assert torch.equal(logits(left), logits(fresh))
    assert [(n, type(m)) for n, m in left.named_modules()] == [(n, type(m)) for n, m in fresh.named_modules()]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    assert not any(getattr(m, kind) for m in left.modules() for kind in (*kinds, "_forward_pre_hooks_with_kwargs"))
    assert not any(isinstance(m, BaseTunerLayer) for m in left.modules())


@every_mixture
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_equal_and_shares_nothing(name: str, copied: Callable[[PeftModel], PeftModel]) -> None:
    model = mixture(name)
    loss_of(model.train())
    before = logits(model.eval())
    twin = copied(model)
    assert torch.equal(logits(twin), before)
    mine, its = ({t.data_ptr() for t in m.state_dict().values() if t.numel()} for m in (model, twin))
    assert not mine & its
    assert twin.base_model.auxiliary is not model.base_model.auxiliary
    assert torch.equal(loss_of(twin.train()), loss_of(model.train()))
    assert twin.auxiliary_losses() == model.auxiliary_losses()


@every_mixture
def test_merging_is_refused_with_its_reason(name: str) -> None:
    model = mixture(name)
    before = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload, layers(model)[0].merge):
        with pytest.raises(ValueError, match=r"cannot be merged: which experts act differs .* unload\(\)"):
            merge()
    assert torch.equal(logits(model), before)


@every_mixture
def test_mixture_is_no_base_of_monkey_jump(name: str) -> None:
    base = METHODS[name][0].peft_name.lower() if name.startswith("moa") else name
    with pytest.raises(ValueError, match=f"base='{base}' cannot be routed: it has a router of its own"):
        MonkeyJumpConfig(base=base)


# ---------------------------------------------------------------------- training


@every_mixture
def test_training_step_reaches_every_weight(name: str) -> None:
    model = mixture(name).train()
    loss_of(model).backward()
    own = trainable(model)
    assert all(p.grad is not None and p.grad.any() for p in own.values())
    kept = [n for n, p in model.named_parameters() if "mixture_" in n and not p.requires_grad]
    frozen = {n.rpartition(".mixture_")[2] for n in kept}
    assert frozen == ({"A.default"} if name == "moe_lora_fa" else set())


@every_mixture
def test_experts_without_a_token_still_have_gradients(name: str) -> None:
    # DDP waits for every parameter: none may leave the graph because no token came its way
    model = mixture(name, **({"top_k": 1} if mixture_config(name).top_k else {}))
    with torch.no_grad():
        for router in routers_of(model):
            router.zero_()[0].fill_(1e-3)
    model.train()
    loss_of(model).backward()
    assert all(p.grad is not None for p in trainable(model).values())


@every_mixture
def test_accumulated_step_equals_the_whole_batch(name: str) -> None:
    found = []
    for parts in (tokens(4).split(4), tokens(4).split(2)):
        model = mixture(name, **silent(name)).train()
        for ids in parts:
            batch = {"input_ids": ids, "labels": ids, **told(model, ids)}
            model(**batch, num_items_in_batch=torch.tensor(4 * 8)).loss.backward()
        found.append({n: p.grad for n, p in trainable(model).items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@every_mixture
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_changes_nothing(name: str, reentrant: bool, forwards: int) -> None:
    changes: dict[str, Any] = {} if name in ("moe_propulsion",) else {"lora_dropout": 0.2}
    if reentrant:  # with losses that read the routers it is refused
        changes |= silent(name)
    found = []
    for checkpointing in (False, True):
        model = mixture(name, **changes)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(7)  # the same dropout
        loss = sum(loss_of(model, seed) for seed in range(forwards))
        loss.backward()
        found.append((loss, {n: p.grad for n, p in trainable(model).items()}))
    torch.testing.assert_close(found[1], found[0])


# ---------------------------------------------------------------------- precision and generation


@every_mixture
@pytest.mark.parametrize("before", [False, True])
def test_routers_stay_float32_in_a_bfloat16_model(name: str, before: bool) -> None:
    exact = [router.detach() for router in routers_of(mixture(name))]
    model = mixture(name, llama().to(torch.bfloat16)) if before else mixture(name).to(torch.bfloat16)
    for router, before_it in zip(routers_of(model), exact):
        assert router.dtype == torch.float32
        assert torch.equal(router, before_it)
    loss = loss_of(model.train())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


@every_mixture
def test_bfloat16_autocast_is_close(name: str) -> None:
    model = mixture(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, loss_of(model), rtol=0.03, atol=0)


@pytest.mark.slow  # seconds of tracing each
@every_mixture
def test_compiled_model_gives_the_same_logits(name: str) -> None:
    model = mixture(name)
    before = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    torch.testing.assert_close(logits(compiled), before, rtol=1e-5, atol=1e-6)


@every_mixture
def test_left_padded_generation_equals_the_rows_alone(name: str) -> None:
    model = mixture(name)
    rows = [tokens(1, length, seed=length) for length in (3, 6, 9)]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    together = model.generate(**left_padded(rows), **settings)[:, -5:]
    alone = [model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings) for row in rows]
    assert together.tolist() == [one[0, -5:].tolist() for one in alone]
    without_cache = model.generate(**left_padded(rows), **settings, use_cache=False)[:, -5:]
    assert without_cache.tolist() == together.tolist()


@every_mixture
def test_conv1d_of_gpt2_is_adapted(name: str, tmp_path: Path) -> None:
    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()

    torch.manual_seed(1)
    no_prompt = {"prompt_length": 0} if name == "moa_soft" else {}  # it wants separate queries, keys and values
    model = get_peft_model(gpt2(), mixture_config(name, target_modules=["c_attn", "c_proj"], **no_prompt))
    position_dependent(trainable(model).values(), size=0.02)
    loss_of(model.train()).backward()
    assert all(p.grad is not None for p in trainable(model).values())
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(gpt2()))

"""Adapters as parametrizations: numbers against weights built by hand, gradients, files, Trainer, compile."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from monkeyjump.allocation import (
    adaptable_modules,
    adapter_parameters,
    allocate_peft,
    attach_peft,
    load_peft,
    merge_peft,
    parameters_along,
    probe_gradients,
    remove_peft,
    save_peft,
    uniform_peft,
)
from monkeyjump.allocation.attach import load_parameters
from monkeyjump.mamba import patch_mamba
from monkeyjump.tasks import InputError
from tiny import VOCAB, llama, position_dependent, tokens, trainable

SSM = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def mamba() -> MambaForCausalLM:
    return seeded(lambda: MambaForCausalLM(MambaConfig(**SSM, time_step_rank=3)))


def mamba2() -> Mamba2ForCausalLM:
    shape = {**SSM, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
    return seeded(lambda: Mamba2ForCausalLM(Mamba2Config(**shape)))


def falcon_mamba() -> FalconMambaForCausalLM:
    return seeded(lambda: FalconMambaForCausalLM(FalconMambaConfig(**SSM, time_step_rank=3)))


def gpt2() -> GPT2LMHeadModel:
    shape = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**shape)))


def patched_mamba() -> MambaForCausalLM:
    return patch_mamba(mamba())


def patched_mamba2() -> Mamba2ForCausalLM:
    return patch_mamba(mamba2())


MODELS = [mamba, mamba2, falcon_mamba, patched_mamba, patched_mamba2, llama, gpt2]
each_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def batch(length: int = 9) -> dict[str, Tensor]:
    return {"input_ids": tokens(2, length), "labels": tokens(2, length)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 9)).logits


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def alternating(model: nn.Module):
    """LoRA on every other module, IA³ on the rest: all of them."""
    names = list(adaptable_modules(model))
    scores = {name: float(i % 2 == 0) for i, name in enumerate(names)}
    return allocate_peft(model, scores, 1.0, 0.5, peft_r=2, peft_alpha=5)


def adapted(make: Callable[[], nn.Module], plan: Callable = alternating) -> nn.Module:
    """A model with adapters that do something; no two of their elements are alike."""
    model = make()
    torch.manual_seed(1)
    attach_peft(model, plan(model), batch())
    position_dependent(adapter_parameters(model).values())
    return model


def by_hand(make: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    """The base model with the adapted weights written into it: an independent merge."""
    plain, given = make(), {name: value.detach() for name, value in adapter_parameters(model).items()}
    for name in adaptable_modules(plain):
        module = plain.get_submodule(name)
        weight = module.weight.data
        if f"{name}.ia3_l" in given:
            factors = given[f"{name}.ia3_l"]
            turned = type(module).__name__ == "Conv1D"  # its outputs are the last axis
            weight.mul_(factors if turned else factors.view(-1, *[1] * (weight.dim() - 1)))
            if module.bias is not None:
                module.bias.data.mul_(factors)
        else:
            delta = 2.5 * given[f"{name}.lora_B"] @ given[f"{name}.lora_A"]
            weight.add_(delta.T if type(module).__name__ == "Conv1D" else delta.view(weight.shape))
    return plain


# ---------------------------------------------------------------------- numbers


@each_model
def test_fresh_adapters_change_nothing(make: Callable[[], nn.Module]):
    model = make()
    before = logits(model)
    attach_peft(model, alternating(model), batch())
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-5)  # conv1d takes another kernel


@each_model
def test_logits_are_those_of_weights_adapted_by_hand(make: Callable[[], nn.Module]):
    model = adapted(make)
    expected = logits(by_hand(make, model))
    assert (logits(model) - logits(make())).abs().max() > 1e-3
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)


@each_model
def test_merged_is_adapted_and_removed_is_the_base(make: Callable[[], nn.Module]):
    model, base = adapted(make), make()
    before = logits(model)
    merged = copy.deepcopy(model)
    merge_peft(merged)
    assert torch.equal(logits(merged), before)
    remove_peft(model)
    for one in (merged, model):
        assert {name: p.shape for name, p in one.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
        assert [type(m) for m in one.modules()] == [type(m) for m in base.modules()]
    assert equal_states(model, base)
    attach_peft(model, alternating(model), batch())  # and again


def test_modules_that_stay_frozen_keep_their_class():
    model = adapted(mamba, lambda model: uniform_peft(model, "lora", only=["in_proj"], peft_r=2))
    merge_peft(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in mamba().modules()]


def test_a_copy_has_its_own_adapters():
    model = adapted(mamba)
    before = logits(model)
    twin = copy.deepcopy(model)
    for parameter in adapter_parameters(twin).values():
        parameter.data.zero_()
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    bias = twin.backbone.layers[0].mixer.dt_proj
    if "ia3_l" in dict(bias.named_parameters(recurse=True)):
        assert not bias.bias.any()


@pytest.mark.parametrize("make", [mamba, mamba2, patched_mamba, patched_mamba2, llama], ids=lambda make: make.__name__)
def test_generation_with_and_without_cache(make: Callable[[], PreTrainedModel]):
    model = adapted(make)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(input_ids=tokens(2, 5), **options)
    with torch.no_grad():
        ids = tokens(2, 5)
        for _ in range(cached.shape[1] - 5):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


def test_adapters_of_a_bfloat16_model_are_float32_and_autocast_does_not_round_them():
    model = mamba().to(torch.bfloat16)
    attach_peft(model, alternating(model), batch())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    model = adapted(llama)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


# ---------------------------------------------------------------------- gradients


@each_model
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_every_adapter_trains_and_nothing_else(make: Callable[[], nn.Module], kind: str):
    model = adapted(make, lambda model: uniform_peft(model, kind, peft_r=2))
    model.train()(**batch()).loss.backward()
    own = {id(p) for p in adapter_parameters(model).values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert all(p.grad is not None and p.grad.any() for p in adapter_parameters(model).values())
    assert len(own) == len(adaptable_modules(model)) * (2 if kind == "lora" else 1)


def test_gradients_are_those_of_differentiating_the_sum():
    """dL/dA = s B^T dL/dW, dL/dB = s dL/dW A^T, dL/dl = rows of W * dL/dW, and of b * dL/db."""
    model = adapted(mamba)
    model(**batch()).loss.backward()
    plain, given = by_hand(mamba, model), adapter_parameters(model)
    plain(**batch()).loss.backward()
    base = mamba()
    for name in adaptable_modules(plain):
        module, g = base.get_submodule(name), plain.get_submodule(name).weight.grad
        if f"{name}.ia3_l" in given:
            expected = (module.weight * g).flatten(1).sum(1)
            if module.bias is not None:
                expected = expected + module.bias * plain.get_submodule(name).bias.grad
            torch.testing.assert_close(given[f"{name}.ia3_l"].grad, expected.detach(), atol=1e-6, rtol=1e-4)
        else:
            a, b, g = given[f"{name}.lora_A"], given[f"{name}.lora_B"], g.flatten(1)
            torch.testing.assert_close(a.grad, 2.5 * b.detach().T @ g, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(b.grad, 2.5 * g @ a.detach().T, atol=1e-6, rtol=1e-4)


class Unread(nn.Module):
    """A model with a layer that its forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.spare = llama(), nn.Linear(4, 4)

    def forward(self, **inputs: Tensor):
        return self.model(**inputs)


def test_an_adapter_without_gradient_is_named_and_the_model_left_as_it_was():
    model = Unread()
    model.spare.weight.requires_grad_(False)
    state, random = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"reaches 2 of 32 trainable tensors .*: spare\.lora_A, spare\.lora_B; leave"):
        attach_peft(model, uniform_peft(model, "lora", peft_r=2), batch())
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert torch.equal(torch.get_rng_state(), random) is False  # A's start was drawn; nothing else may be
    with pytest.raises(ValueError, match=r"spare\.ia3_l; leave"):
        attach_peft(model, uniform_peft(model, "ia3"), batch())


def test_the_probe_leaves_no_trace():
    model = mamba()
    torch.manual_seed(3)
    attach_peft(model, uniform_peft(model, "lora"), None)
    expected, random = adapter_parameters(model), torch.get_rng_state()
    other = mamba()
    torch.manual_seed(3)
    attach_peft(other, uniform_peft(other, "lora"), batch())
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in adapter_parameters(other).items():
        assert torch.equal(parameter, expected[name])
        assert parameter.grad is None
    assert not any(module.training for module in other.modules())
    assert not trainable(model)  # without a probe nothing trains


def test_a_gradient_that_is_not_finite_is_named():
    model = llama()
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"not finite in a probe backward pass: model\.layers\.0"):
        attach_peft(model, uniform_peft(model, "ia3"), batch())


# ---------------------------------------------------------------------- torch.compile, Trainer


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # of transformers
@pytest.mark.parametrize("make", [mamba, patched_mamba, llama], ids=lambda make: make.__name__)
def test_compiled_is_eager(make: Callable[[], nn.Module]):
    model = adapted(make)
    inputs = batch(5)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**inputs, use_cache=False).loss
    found.backward()
    torch.testing.assert_close(found, loss)
    for name, parameter in adapter_parameters(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def run(folder: Path, steps: int, resume: bool = False) -> nn.Module:
    model = mamba()
    torch.manual_seed(5)
    attach_peft(model, alternating(model), batch())
    rows = Dataset.from_dict({"input_ids": tokens(8, 6).tolist(), "labels": tokens(8, 6).tolist()})
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    if steps < 6:
        trainer.add_callback(StopAfter(steps))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model


def test_trainer_trains_the_adapters_and_resumes_bit_for_bit(tmp_path: Path):
    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed = run(tmp_path / "parts", 6, resume=True)
    started = mamba()
    torch.manual_seed(5)
    attach_peft(started, alternating(started), batch())
    for name, parameter in adapter_parameters(whole).items():
        assert torch.equal(parameter, adapter_parameters(resumed)[name]), name
        assert not torch.equal(parameter, adapter_parameters(started)[name]), name
    remove_peft(whole)
    assert equal_states(whole, mamba())


# ---------------------------------------------------------------------- files


@each_model
def test_saved_and_loaded_is_the_same(make: Callable[[], nn.Module], tmp_path: Path):
    model = adapted(make)
    save_peft(model, tmp_path / "out")
    loaded = make()
    plan = load_peft(loaded, tmp_path / "out")
    assert plan == alternating(make())
    assert torch.equal(logits(loaded), logits(model))
    assert not trainable(loaded)
    further = make()
    load_peft(further, tmp_path / "out", probe=batch())
    assert torch.equal(logits(further), logits(model))
    assert len(trainable(further)) == len(adapter_parameters(further))
    record = json.loads((tmp_path / "out" / "allocation.json").read_text())
    assert {one["kind"] for one in record["modules"]} == {"lora", "ia3"}
    assert (record["method"], record["scale"], record["format"]) == ("given", 2.5, 1)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    folder = tmp_path / "out"
    save_peft(adapted(llama), folder)

    def changed(name: str, data: bytes) -> None:
        save_peft(adapted(llama), folder)
        (folder / name).write_bytes(data)

    weights = (folder / "adapters.safetensors").read_bytes()
    flipped = weights[:-1] + bytes([weights[-1] ^ 1])
    model = llama()
    for data in (flipped, weights[:100], b""):
        changed("adapters.safetensors", data)
        with pytest.raises(InputError, match=r"adapters\.safetensors: damaged file"):
            load_peft(model, folder)
    plan = json.loads((folder / "allocation.json").read_text())
    for record in ({**plan, "format": 9}, {"format": 1}, {**plan, "modules": [{}]}, [], {**plan, "more": 1}):
        changed("allocation.json", json.dumps(record).encode())
        with pytest.raises(ValueError, match=r"allocation\.json"):
            load_peft(model, folder)
    with pytest.raises(ValueError, match=r"allocation\.json is missing; give a folder that save_peft wrote"):
        load_peft(model, tmp_path)
    assert torch.equal(logits(model), logits(llama()))


def test_another_base_model_is_refused_or_noticed(tmp_path: Path):
    save_peft(adapted(llama), tmp_path / "out")
    with pytest.warns(UserWarning, match="holds other weights than those that this adapter was trained on"):
        load_peft(llama(seed=7), tmp_path / "out")
    wider = llama(intermediate_size=40)
    misfit = r"do not fit: .*lora_B is \[48, 2\], the plan says \[40, 2\]"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the other weights
        with pytest.raises(ValueError, match=misfit):
            load_peft(wider, tmp_path / "out")
        with pytest.raises(ValueError, match=r"plan names 'model\.layers\.1"):
            load_peft(llama(num_hidden_layers=1), tmp_path / "out")
    assert equal_states(wider, llama(intermediate_size=40))


def test_what_cannot_be_attached_is_said(tmp_path: Path):
    model = adapted(llama)
    with pytest.raises(ValueError, match="has allocated adapters already; merge_peft or remove_peft first"):
        attach_peft(model, alternating(model), batch())
    with pytest.raises(ValueError, match="no allocated adapters; put some on it"):
        save_peft(llama(), tmp_path)
    tuned = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj is adapted by PEFT already"):
        attach_peft(tuned, uniform_peft(llama(), "ia3", only=["k_proj"]), batch())


# ---------------------------------------------------------------------- beside other parametrizations


class Gate(nn.Module):
    """A mask on the rows of a weight."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(rows))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.logits > 0).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


def test_a_mask_put_on_later_removes_the_adapters_part_too():
    model = adapted(mamba, lambda model: uniform_peft(model, "lora", peft_r=2))
    conv = model.backbone.layers[0].mixer.conv1d
    parametrize.register_parametrization(conv, "weight", Gate(conv.out_channels))
    assert not conv.weight.any()
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.conv1d\.weight has another parametrization"):
        merge_peft(model)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_permuting_everything_along_an_axis_permutes_the_weight(kind: str):
    model = adapted(mamba, lambda model: uniform_peft(model, kind, peft_r=2))
    for leaf, axis in (("in_proj", 0), ("out_proj", 1), ("conv1d", 0), ("dt_proj", 0)):
        module = model.backbone.layers[0].mixer.get_submodule(leaf)
        order = torch.randperm(module.weight.shape[axis], generator=torch.Generator().manual_seed(0))
        expected = module.weight.detach().index_select(axis, order)
        parameters = parameters_along(module, "weight", axis)
        if axis == 0 and module.bias is not None:
            expected_bias = module.bias.detach()[order]
            parameters += parameters_along(module, "bias", 0)
        for parameter, own in parameters:
            parameter.data = parameter.data.index_select(own, order)
        assert torch.equal(module.weight, expected), leaf
        assert axis or module.bias is None or torch.equal(module.bias, expected_bias), leaf


# ---------------------------------------------------------------------- one number at a time


def test_a_starts_as_pefts_does_and_b_at_zero():
    torch.manual_seed(2)
    theirs = get_peft_model(llama(), LoraConfig(r=3, target_modules=r"model\.layers\.0\.self_attn\.q_proj"))
    model = llama()
    plan = allocate_peft(model, {"model.layers.0.self_attn.q_proj": 1.0}, 1.0, 1.0, peft_r=3)
    attach_peft(model, plan, None)
    a, b = adapter_parameters(model).values()
    expected = theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert a.shape == expected.shape
    bound = 1 / math.sqrt(32)  # uniform, as kaiming with a = sqrt(5) says
    for one in (a, expected):
        assert 0.9 * bound < one.abs().max() <= bound
    assert not b.any()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_modes_of_modules_stay(kind: str):
    model = mamba()
    model.backbone.layers[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    attach_peft(model, uniform_peft(model, kind), batch())
    for name, module in model.named_modules():
        owner = name.partition(".parametrizations")[0]
        assert module.training == modes[owner], name


def test_the_probe_asks_the_callers_loss_in_training_mode_also_without_gradients():
    model, seen = llama(), []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append((model.training, sorted(batch)))
        return model(input_ids=batch["ids"]).logits.square().mean()

    with torch.no_grad():
        attach_peft(model, uniform_peft(model, "lora", peft_r=2), {"ids": tokens()}, loss)
    assert seen == [(True, ["ids"])]


def test_a_gradient_of_zero_or_of_another_pass_is_none():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()  # nothing of gate and up comes through
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj\.ia3_l, model\.layers\.1\.mlp\.up_proj\.ia3_l"):
        attach_peft(model, uniform_peft(model, "ia3"), batch())
    model = Unread()
    attach_peft(model, uniform_peft(model, "ia3"), None)
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"reaches 1 of 16 .*spare\.ia3_l; leave"):
        probe_gradients(model, batch())
    assert all(parameter.grad.eq(1).all() for parameter in adapter_parameters(model).values())


def test_tensors_that_do_not_fit_are_named():
    model = adapted(llama)
    good = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    name, first = next(iter(good.items()))
    for wrong, text in (
        ({key: value for key, value in good.items() if key != name}, "lora_A is missing"),
        ({**good, "other.lora_A": first}, "other.lora_A is unknown"),
        ({**good, name: first * torch.nan}, "lora_A holds values that are not finite"),
        ({**good, name: first[:1]}, r"lora_A is \[1, 32\], the plan says \[2, 32\]"),
    ):
        with pytest.raises(ValueError, match=f"the adapters do not fit: .*{text}"):
            load_parameters(model, wrong)
    assert all(torch.equal(parameter, good[key]) for key, parameter in adapter_parameters(model).items())


def test_a_plan_that_adapts_nothing_is_refused():
    model = llama()
    plan = allocate_peft(model, dict.fromkeys(adaptable_modules(model), 1.0))
    idle = dataclasses.replace(plan, modules=tuple(one for one in plan.modules if one.kind == "frozen"))
    with pytest.raises(ValueError, match="the plan adapts no module; raise peft_application_ratio"):
        attach_peft(model, idle, batch())


def test_going_on_from_a_folder_is_probed_and_a_failure_leaves_the_model_plain(tmp_path: Path):
    model = Unread()
    torch.manual_seed(0)
    attach_peft(model, uniform_peft(model, "ia3"), None)
    save_peft(model, tmp_path / "out")
    again, plain = Unread(), Unread()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of other weights: `spare` is drawn anew
        with pytest.raises(ValueError, match=r"spare\.ia3_l; leave"):
            load_peft(again, tmp_path / "out", probe=batch())
    assert again.state_dict().keys() == plain.state_dict().keys()

"""Monkey Jump on patched Mamba blocks: in_proj, x_proj, dt_proj and out_proj as experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from monkeyjump.mamba import patch_mamba, unpatch_mamba
from monkeyjump.tuner.inspect import describe_routing
from monkeyjump.tuner.model import routers
from tiny import VOCAB, gates, left_padded, position_dependent, routed, tokens, trainable

SHAPE = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}
FOUR = ["in_proj", "x_proj", "dt_proj", "out_proj"]


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**SHAPE, time_step_rank=3)).eval()


def falcon_mamba() -> FalconMambaForCausalLM:
    torch.manual_seed(0)
    return FalconMambaForCausalLM(FalconMambaConfig(**SHAPE, time_step_rank=3)).eval()


def mamba2() -> Mamba2ForCausalLM:
    torch.manual_seed(0)
    config = Mamba2Config(**SHAPE, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
    return Mamba2ForCausalLM(config).eval()


def jumping(make: Callable[[], nn.Module] = mamba, targets: list[str] = FOUR, **config: object) -> PeftModel:
    """A patched model, all targets experts, adapters that do something; no two elements are alike."""
    settings = {"target_modules": targets, "shared_modules": [], "top_k": 2, "temperature": 0.3, **config}
    model = routed(patch_mamba(make()), **settings)
    position_dependent(trainable(model).values())
    position_dependent(router.centers["default"] for router in routers(model))
    return model.eval()


MODELS = [(mamba, FOUR), (falcon_mamba, FOUR), (mamba2, ["in_proj", "out_proj"])]
each_model = pytest.mark.parametrize(("make", "targets"), MODELS, ids=lambda given: getattr(given, "__name__", "-"))


@each_model
def test_all_of_them_are_experts_and_get_their_gradients(make: Callable[[], nn.Module], targets: list[str]):
    model = jumping(make, targets)
    for block in describe_routing(model).blocks:
        assert set(block.routed) == {f"mixer.{leaf}" for leaf in targets}
        assert not block.shared
    model.train()(input_ids=tokens(3, 12), labels=tokens(3, 12)).loss.backward()
    adapters = trainable(model)
    assert len(adapters) == 2 * 2 * len(targets)
    assert [name for name, p in adapters.items() if p.grad is None or not p.grad.any()] == []


def test_out_proj_is_shared_by_default():
    model = routed(patch_mamba(mamba()), target_modules=FOUR)
    assert describe_routing(model).blocks[0].shared == ("mixer.out_proj",)


@each_model
@pytest.mark.parametrize("granularity", ["token", "mean"])
def test_generation_with_cache_is_generation_without(
    make: Callable[[], nn.Module], targets: list[str], granularity: str
):
    model = jumping(make, targets, granularity=granularity)
    batch = left_padded([tokens(1, 7), tokens(1, 4, seed=8)])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    alone = model.generate(input_ids=tokens(1, 4, seed=8), **options)
    assert torch.equal(alone[0], cached[1, 3:])


# ---------------------------------------------------------------------- the reference: loops, float64


def adapted(model: PeftModel, layer: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    """`W x + b + m s B A x` for one token `x` `[d_in]`."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    y = base.weight @ x + m * layer.scaling["default"] * (b @ (a @ x))
    return y if base.bias is None else y + base.bias


def mixed(model: PeftModel, mixer: nn.Module, x: Tensor, m: Tensor) -> Tensor:
    """One sequence `[T, d]` through a mixer, token by token; gates `m` `[T, 4]` in the order of `slots`."""
    slots = routers(model)[0].slots["default"]
    gate = {slot.rpartition(".")[2]: m[:, number] for number, slot in enumerate(slots)}
    inner, kernel = mixer.intermediate_size, mixer.conv_kernel_size
    A, state, past = -torch.exp(mixer.A_log), torch.zeros_like(mixer.A_log), [torch.zeros(inner).double()] * kernel
    rows = []
    for t in range(len(x)):
        u, z = adapted(model, mixer.in_proj, x[t], gate["in_proj"][t]).chunk(2)
        past = [*past[1:], u]
        u = F.silu(sum(mixer.conv1d.weight[:, 0, k] * past[k] for k in range(kernel)) + mixer.conv1d.bias)
        selected = adapted(model, mixer.x_proj, u, gate["x_proj"][t])
        step, b, c = selected.split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size])
        delta = F.softplus(adapted(model, mixer.dt_proj, step, gate["dt_proj"][t]))
        state = torch.exp(delta[:, None] * A) * state + (delta * u)[:, None] * b[None]
        y = (state @ c + mixer.D * u) * F.silu(z)
        rows.append(adapted(model, mixer.out_proj, y, gate["out_proj"][t]))
    return torch.stack(rows)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@torch.no_grad()
def test_logits_are_those_of_a_loop_over_tokens_in_float64():
    model = jumping().double()
    model.config.residual_in_fp32 = False
    for block in model.base_model.model.backbone.layers:
        block.residual_in_fp32 = False
    ids = tokens(2, 7)
    decided = [one.double() for one in gates(model, input_ids=ids)]
    assert all(0 < (one > 0).double().mean() < 1 for one in decided)  # some adapters are off for some tokens
    backbone = model.base_model.model.backbone
    for row in range(2):
        h = backbone.embeddings.weight[ids[row]]
        for block, m in zip(backbone.layers, decided):
            h = h + mixed(model, block.mixer, normed(block.norm, h), m[row])
        expected = normed(backbone.norm_f, h) @ model.base_model.model.lm_head.weight.T
        torch.testing.assert_close(model(input_ids=ids).logits[row].double(), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- only where it is patched


def test_what_a_stock_mixer_does_not_call_is_refused_with_the_remedy():
    for leaf in ("dt_proj", "out_proj"):
        with pytest.raises(ValueError, match=rf"mixer\.{leaf} and 1 more: .*\(patch_mamba of monkeyjump\.mamba makes"):
            routed(mamba(), target_modules=["in_proj", leaf])
        with pytest.raises(ValueError, match=rf"mixer\.{leaf} and 1 more: "):
            routed(unpatch_mamba(patch_mamba(mamba())), target_modules=["in_proj", leaf])
    with pytest.raises(ValueError, match=r"the fused kernel of Mamba2Mixer reads out_proj\.weight.*\(patch_mamba of"):
        routed(mamba2(), target_modules=["in_proj", "out_proj"])


@pytest.mark.parametrize("base", ["lora", "loha"])
def test_the_convolution_is_refused_also_where_it_is_patched(base: str):
    with pytest.raises(ValueError, match=r"mixer\.conv1d and 1 more: ScanMambaMixer reads conv1d\.weight directly"):
        routed(patch_mamba(mamba()), base=base, target_modules=["in_proj", "conv1d"])


def test_saved_adapters_load_on_a_patched_model_only(tmp_path: Path):
    model = jumping()
    model.save_pretrained(tmp_path)
    expected = model(input_ids=tokens()).logits
    loaded = PeftModel.from_pretrained(patch_mamba(mamba()), tmp_path)
    assert torch.equal(loaded(input_ids=tokens()).logits, expected)
    with pytest.raises(ValueError, match=r"mixer\.dt_proj and 1 more: MambaMixer reads dt_proj\.weight"):
        PeftModel.from_pretrained(mamba(), tmp_path)

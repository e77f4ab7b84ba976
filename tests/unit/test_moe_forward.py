"""Each mixture against its formula, token by token and expert by expert in float64, and the operations under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moe_methods import METHODS, mixture, mixture_config
from monkeyjump.moe import (
    ExpertConfig,
    HydraLoRAConfig,
    MixLoRAAttentionConfig,
    MixLoRAConfig,
    MoAConfig,
    MoEConfig,
    MoELoRAConfig,
    MoLAConfig,
    MoREConfig,
)
from monkeyjump.moe.layer import ExpertLayer
from monkeyjump.moe.model import layer_of
from monkeyjump.ops import (
    DropoutMask,
    mixture_delta,
    mixture_delta_reference,
    mixture_linear,
    mixture_scale,
    mixture_scale_reference,
    router_logits,
)
from tiny import llama, trainable

D_IN, D_OUT = 8, 6

BLOCKWISE = ("mixlora", "more", "moa_soft", "moa_sparse")  # their layers ask their block: test_moe_mixed.py


class OneProjection(nn.Module):
    """A model of one projection, in place of a whole transformer."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.config: dict[str, Any] = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


def projection(config: ExpertConfig, base: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    config.target_modules = {"projection"}
    model = get_peft_model(OneProjection(base or nn.Linear(D_IN, D_OUT)).double(), config)
    return model.double().eval()


def expected(layer: ExpertLayer, x: Tensor, config: Any) -> Tensor:
    """The layer's formula in a loop, `[B, T, d_out]`."""
    base, router = layer.get_base_layer(), layer.mixture_router["default"]
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    experts = len(router)
    rows = []
    for token in x.flatten(0, 1):
        p = torch.exp(router @ token) / torch.exp(router @ token).sum()
        best = sorted(range(experts), key=lambda n: -p[n])[: config.top_k or experts]
        total = sum(p[n] for n in best)
        y = weight @ token + base.bias
        if config.peft_name == "MOE_PROPULSION":
            z = 1 + layer.mixture_delta["default"]
            rows.append(y * (1 + sum(p[n] / total * (z[n] ** config.degree - 1) for n in best)))
            continue
        a, b = layer.mixture_A["default"], layer.mixture_B["default"]
        for n in best:
            mine = slice(n * config.rank, (n + 1) * config.rank)
            u = (a if config.peft_name == "HYDRALORA" else a[mine]) @ token
            if config.peft_name == "MOE_ADALORA":
                u = layer.mixture_E["default"][mine, 0] * u
            y = y + config.lora_alpha / config.rank * (p[n] / total) * (b[:, mine] @ u)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


CASES = [
    MoELoRAConfig(num_experts=4, top_k=2, r=2, init_weights=False),
    HydraLoRAConfig(num_experts=3, r=2, init_weights=False),
    HydraLoRAConfig(num_experts=4, top_k=2, r=1, init_weights=False),
    MoLAConfig(num_experts=[3], top_k=2, r=2, init_weights=False),
    MoEConfig(base="lora", num_experts=4, top_k=1, r=2, init_weights=False),
    MoEConfig(base="lora_fa", num_experts=4, top_k=3, r=2, init_weights=False),
    MoEConfig(base="adalora", num_experts=3, init_r=2, target_r=1, total_step=9, init_weights=False),
    MoEConfig(base="propulsion", num_experts=4, degree=5, init_weights=False),
]


@pytest.mark.parametrize("hooked", [False, True])  # fused with the base product, or beside the base layer's call
@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.peft_name}-{c.num_experts}-{c.top_k}")
def test_forward_equals_the_formula(config: Any, hooked: bool) -> None:
    model = projection(config)
    layer = model.base_model.model.projection
    if hooked:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, D_IN, dtype=torch.float64)
    with torch.no_grad():
        y = model(x)
        assert (y - layer.base_layer(x)).abs().max() > 1e-4
        if config.peft_name == "MOE_ADALORA":  # PEFT divides by the rank plus a small number
            torch.testing.assert_close(y, expected(layer, x, config), rtol=1e-4, atol=1e-7)
        else:
            torch.testing.assert_close(y, expected(layer, x, config), rtol=1e-9, atol=1e-12)


def test_conv1d_is_a_transposed_linear_layer() -> None:
    config = MoEConfig(num_experts=4, top_k=2, r=2, init_weights=False)
    model = projection(config, Conv1D(D_OUT, D_IN))
    layer, x = model.base_model.model.projection, torch.randn(2, 5, D_IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(layer, x, config), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- operations


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_mixture_and_its_gradients_equal_the_reference(dropout: float, shared: bool, experts: int, whole: bool) -> None:
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, b, gates = normal(2, 3, D_IN), normal(D_OUT, 2 * experts), normal(2, 3, experts)
    a = normal(2 if shared else 2 * experts, D_IN)
    weight, bias = normal(D_OUT, D_IN).detach(), normal(D_OUT).detach()
    mask = DropoutMask.draw(x.detach(), dropout) if dropout else None
    keep = None if mask is None else mask.keep(x.dtype)
    reference = mixture_delta_reference(x, a, b, gates, 1.5, keep)
    if whole:
        reference = reference + nn.functional.linear(x, weight, bias)
        fused = mixture_linear(x, weight, bias, a, b, gates, 1.5, mask)
    else:
        fused = mixture_delta(x, a, b, gates, 1.5, mask)
    compare(fused, reference, (x, a, b, gates))


def test_scaling_and_its_gradients_equal_the_reference() -> None:
    torch.manual_seed(0)
    y, gain, gates = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5), (2, 3, 4)))
    compare(mixture_scale(y, gain, gates), mixture_scale_reference(y, gain, gates), (y, gain, gates))


def test_logits_and_their_gradients_equal_the_product() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (4, 5)))
    compare(router_logits(x, weight), x @ weight.T, (x, weight))


def compare(fused: Tensor, reference: Tensor, inputs: tuple[Tensor, ...]) -> None:
    found = []
    for y in (fused, reference):
        weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
        found.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    torch.testing.assert_close(*found)


def test_router_of_a_bfloat16_model_decides_in_float32() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight)
    assert torch.equal(logits, x.float() @ weight.T)


def test_nothing_as_wide_as_all_experts_outputs_is_kept() -> None:
    kept: list[int] = []
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(96, 64)
    a, b = torch.randn(8, 64, requires_grad=True), torch.randn(96, 8, requires_grad=True)
    gates = torch.rand(50, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mixture_linear(x, weight, None, a, b, gates)
    assert sorted(kept) == sorted(t.numel() for t in (x, weight, a, b, torch.empty(50, 8), gates))


# ---------------------------------------------------------------------- gradients and layers


@pytest.mark.parametrize("name", [n for n in METHODS if n not in BLOCKWISE])
def test_every_weight_gets_a_gradient_whoever_was_chosen(name: str) -> None:
    model = mixture(name).train()
    x = torch.randn(1, 2, 32)  # two tokens: with 4 experts and top-1 or top-2 some stay without any
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer(x).square().sum().backward()
    assert layer.mixture_router["default"].grad.any()
    for own in trainable(layer).values():
        assert own.grad is not None
    assert not any(p.grad is not None for n, p in layer.named_parameters() if not p.requires_grad)


def test_frozen_a_stays_frozen_and_differs_between_experts() -> None:
    model = mixture("moe_lora_fa")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.set_adapter("default")
    assert not layer.mixture_A["default"].requires_grad
    experts = layer.per_expert(layer.mixture_A["default"], "default")
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    ("given", "layers", "expected"),
    [
        ("2468", 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ("1357", 6, [1, 1, 3, 5, 5, 7]),
        ([1, 2, 3], 3, [1, 2, 3]),
        (4, 3, [4, 4, 4]),
    ],
)
def test_experts_of_mola_grow_with_the_layer(given: Any, layers: int, expected: list[int]) -> None:
    config = MoLAConfig(num_experts=given, top_k=1)
    assert [config.experts_at(layer, layers) for layer in range(layers)] == expected


def test_layers_of_mola_get_their_experts() -> None:
    model = get_peft_model(llama(num_hidden_layers=4), MoLAConfig(num_experts="1357", target_modules=["q_proj"]))
    found = [m.mixture_router["default"].shape[0] for m in model.modules() if isinstance(m, ExpertLayer)]
    assert found == [1, 3, 5, 7]


def test_layer_outside_any_list_is_refused_where_layers_differ() -> None:
    with pytest.raises(ValueError, match="lm_head lies in no list of layers"):
        layer_of(llama(), "lm_head")
    with pytest.raises(ValueError, match="lm_head lies in no list of layers"):
        get_peft_model(llama(), MoLAConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize("name", METHODS)
def test_adapter_starts_as_the_base_model(name: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), mixture_config(name, init_weights=True)).eval()
    ids = torch.arange(1, 9).unsqueeze(0)
    tolerance = 1e-2 if name == "moe_propulsion" else 0.0  # its experts start a thousandth away, to the power 15
    torch.testing.assert_close(model(ids).logits, llama()(ids).logits, rtol=0, atol=tolerance + 1e-6)


KAIMING = {"uniform": 1 / 16}  # of what reads 256 numbers
STARTS: dict[str, dict[str, dict[str, float]]] = {
    "moelora": {"mixture_router": KAIMING, "mixture_A": KAIMING, "mixture_B": {"normal": 0.0}},
    "hydralora": {"mixture_router": KAIMING, "mixture_A": KAIMING, "mixture_B": {"normal": 0.0}},
    "moe_adalora": {"mixture_A": {"normal": 0.02}, "mixture_B": {"normal": 0.02}, "mixture_E": {"normal": 0.0}},
    "moe_propulsion": {"mixture_delta": {"normal": 1e-3}},
    "mixlora": {"expert_router.mixture_router": {"normal": 0.02}},
    "more": {"mixture_tasks": {"normal": 0.01}, "mixture_router": KAIMING, "mixture_router_bias": {"normal": 0.0}},
    "moa_soft": {
        "mixture_down": {"uniform": 1e-4 * (6 / (256 + 16)) ** 0.5},  # Xavier's bound times the gain
        "mixture_up": {"uniform": 1e-4 * (6 / (256 + 16)) ** 0.5},
        "mixture_prompt_gate": {"normal": 0.0},
    },
}


@pytest.mark.parametrize("name", STARTS)
def test_parameters_start_as_the_definition_says(name: str) -> None:
    torch.manual_seed(0)
    base = llama(hidden_size=256, num_hidden_layers=1)
    model = get_peft_model(base, mixture_config(name, init_weights=True, target_modules=["q_proj", "gate_proj"]))
    for holder, start in STARTS[name].items():
        own = [p.flatten() for n, p in model.named_parameters() if n.endswith(f"{holder}.default")]
        assert own, holder
        for values in own:
            if "uniform" in start:  # of hundreds of draws the largest is near the bound
                assert 0.9 * start["uniform"] < values.abs().max() <= start["uniform"], holder
            else:
                assert values.std().item() == pytest.approx(start["normal"], rel=0.15), holder


# ---------------------------------------------------------------------- configs


def test_base_chooses_the_config_class() -> None:
    assert MoEConfig(base="propulsion").degree == 15
    assert MoEConfig(base="lora", r=3).rank == 3
    assert MoEConfig(base="adalora", init_r=9, total_step=9).rank == 9


DEFAULTS = [
    (MoELoRAConfig(), {"top_k": 2, "balance_weight": 0.01, "contrastive_weight": 0.01, "contrastive_temperature": 0.1}),
    (MoELoRAConfig(), {"contrastive_tokens": 32}),
    (HydraLoRAConfig(), {"top_k": None, "balance_weight": 0.0}),
    (MoLAConfig(), {"num_experts": "2468", "top_k": 2, "balance_weight": 0.001}),
    (MixLoRAConfig(), {"top_k": 2, "balance_weight": 0.001}),
    (MixLoRAAttentionConfig(), {"top_k": 2, "balance_weight": 0.01}),
    (MoREConfig(num_tasks=2), {"contrastive_weight": 0.1, "contrastive_temperature": 0.05, "rank_scale": "rank"}),
    (MoAConfig(), {"r": 8, "lora_alpha": 8, "variant": "soft", "router": "swiglu", "router_expansion": 4}),
    (MoAConfig(), {"parallel_size": 16, "prompt_length": 10}),
    (MoAConfig(variant="sparse"), {"max_threshold": 0.5, "threshold": "learned", "prompt_length": 0}),
    (MoEConfig(), {"base": "lora", "top_k": 2, "balance_weight": 0.0}),
    (MoEConfig(base="adalora", total_step=9), {"init_r": 12, "target_r": 8, "orth_reg_weight": 0.5, "beta1": 0.85}),
    (MoEConfig(base="propulsion"), {"degree": 15, "balance_weight": 0.0}),
]


@pytest.mark.parametrize(("config", "values"), DEFAULTS, ids=lambda value: getattr(value, "peft_name", ""))
def test_defaults_are_those_of_the_definitions(config: Any, values: dict[str, Any]) -> None:
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoELoRAConfig(num_expert=4), r"'num_expert' \(value 4\): did you mean 'num_experts'\?"),
        (lambda: MoEConfig(base="propulsion", r=2), r"'r' \(value 2\): MoEConfig\(base='propulsion'\) has the fields"),
        (lambda: MoEConfig(base="lorafa"), "base='lorafa' is not known: did you mean 'lora_fa'"),
        (lambda: MoELoRAConfig(num_experts=0), "num_experts=0 is out of range"),
        (lambda: MoELoRAConfig(num_experts=2, top_k=3), "top_k=3 is out of range: there are only num_experts=2"),
        (lambda: MoLAConfig(num_experts="2x"), "num_experts='2x' is out of range"),
        (lambda: MoLAConfig(num_experts="1230"), "num_experts=0 is out of range"),
        (lambda: MoEConfig(base="adalora"), "total_step=None is out of range"),
        (lambda: MoEConfig(base="adalora", init_r=2, target_r=3, total_step=9), "target_r=3 is out of range"),
        (lambda: MoELoRAConfig(lora_dropout=1.0), "lora_dropout=1.0 is out of range"),
        (lambda: MoELoRAConfig(contrastive_tokens=1), "contrastive_tokens=1 is out of range"),
    ],
)
def test_bad_field_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="target_modules names 'qproj', which matches nothing: did you mean 'q_proj'"):
        get_peft_model(llama(), MoELoRAConfig(target_modules=["qproj", "v_proj"]))

"""The fused operations against their reference: values, gradients, dtypes, shapes, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from monkeyjump.ops import (
    DropoutMask,
    gated_delta,
    gated_linear,
    gated_linear_reference,
    gated_scale,
    gated_scale_reference,
    low_rank,
)
from monkeyjump.ops.dropout import _places, spread
from monkeyjump.tuner.fused import FusedLoraLinear, FusedSVDLinear
from tiny import llama, routed, tokens, trainable


def operands(dtype: torch.dtype = torch.float64, adapters: torch.dtype | None = None, shape: tuple = (2, 3)) -> dict:
    torch.manual_seed(0)
    adapters = adapters or dtype
    return {
        "x": torch.randn(*shape, 5, dtype=dtype, requires_grad=True),
        "weight": torch.randn(4, 5, dtype=dtype),
        "bias": torch.randn(4, dtype=dtype),
        "a": torch.randn(2, 5, dtype=adapters, requires_grad=True),
        "b": torch.randn(4, 2, dtype=adapters, requires_grad=True),
    }


SEEDED = torch.Generator().manual_seed(0)
GATES = {"none": None, **{n: torch.rand(2, t, 1, generator=SEEDED).double() for n, t in (("token", 3), ("row", 1))}}


def mask_for(x: Tensor, p: float) -> DropoutMask | None:
    return DropoutMask.draw(x.detach(), p) if p else None


def reference(given: dict, gate: Tensor | None, scale: float, dropout: DropoutMask | None) -> Tensor:
    x = given["x"]
    keep = None if dropout is None else spread(dropout.bits, x.shape, x.dtype) / (1 - dropout.p)
    factor = torch.full((1,), scale, dtype=x.dtype) if gate is None else gate * scale
    return gated_linear_reference(**given, gate=factor.to(x.dtype), keep=keep)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("gate", GATES)
def test_values_and_gradients_equal_the_reference(gate: str, dropout: float) -> None:
    given = operands()
    mask = mask_for(given["x"], dropout)
    grads = []
    for out in (
        gated_linear(**given, gate=GATES[gate], scale=1.5, dropout=mask),
        reference(given, GATES[gate], 1.5, mask),
    ):
        weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
        grads.append((out, *torch.autograd.grad((out * weights).sum(), [given[n] for n in ("x", "a", "b")])))
    for mine, expected in zip(*grads):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("gate", GATES)
def test_gradients_pass_gradcheck(gate: str, dropout: float) -> None:
    given = operands()
    weight, bias = given["weight"], given["bias"]
    inputs = (given["x"], given["a"], given["b"])
    m, mask = GATES[gate], mask_for(given["x"], dropout)
    assert torch.autograd.gradcheck(lambda x, a, b: gated_linear(x, weight, bias, a, b, m, 1.5, mask), inputs)
    assert torch.autograd.gradcheck(lambda x, a, b: gated_delta(x, a, b, m, 1.5, mask), inputs)


def test_the_delta_is_what_the_linear_adds() -> None:
    given = operands()
    base = nn.functional.linear(given["x"], given["weight"], given["bias"])
    delta = gated_delta(given["x"], given["a"], given["b"], GATES["token"], 0.5)
    torch.testing.assert_close(base + delta, gated_linear(**given, gate=GATES["token"], scale=0.5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_bases_with_float32_adapters(dtype: torch.dtype, tolerance: float) -> None:
    given = operands(dtype, torch.float32)
    out = gated_linear(**given, gate=GATES["token"], scale=1.5)
    out.float().sum().backward()
    assert out.dtype == given["x"].grad.dtype == dtype
    assert given["a"].grad.dtype == given["b"].grad.dtype == torch.float32
    exact = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    expected = reference(exact, GATES["token"], 1.5, None)
    expected.sum().backward()
    for mine, theirs in [(out, expected), *((given[n].grad, exact[n].grad) for n in ("x", "a", "b"))]:
        torch.testing.assert_close(
            mine.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max())
        )


def test_inputs_without_rows_and_without_order() -> None:
    empty = operands(shape=(2, 0))
    out = gated_linear(**empty, gate=torch.rand(2, 0, 1, dtype=torch.float64))
    assert out.shape == (2, 0, 4)
    out.sum().backward()
    assert not empty["a"].grad.any()
    given = operands()
    strided = {**given, "x": given["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()}
    assert not strided["x"].is_contiguous()
    torch.testing.assert_close(gated_linear(**strided), gated_linear(**given))


@pytest.mark.parametrize("operation", ["linear", "delta", "scale"])
def test_a_second_derivative_is_refused(operation: str) -> None:
    given = operands()
    x, a, b = given["x"], given["a"], given["b"]
    gain = torch.rand(5, dtype=torch.float64, requires_grad=True)
    out = {"linear": gated_linear(**given), "delta": gated_delta(x, a, b), "scale": gated_scale(x, gain)}[operation]
    (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("gate", GATES)
def test_the_gated_scaling_passes_gradcheck_and_equals_its_reference(gate: str) -> None:
    torch.manual_seed(0)
    y, gain = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(gated_scale(y, gain, GATES[gate]), gated_scale_reference(y, gain, GATES[gate]))
    inputs = (y.requires_grad_(), gain.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, gain: gated_scale(y, gain, GATES[gate]), inputs)
    assert torch.autograd.gradcheck(lambda gain: gated_scale(y.detach(), gain, GATES[gate]), inputs[1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_the_gated_scaling_of_half_precision_outputs(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    y, gain, gate = torch.randn(2, 3, 4).to(dtype).requires_grad_(), torch.randn(4, requires_grad=True), GATES["token"]
    out = gated_scale(y, gain, gate.float())
    out.float().sum().backward()
    assert (out.dtype, y.grad.dtype, gain.grad.dtype) == (dtype, dtype, torch.float32)
    exact_y, exact_gain = y.detach().double().requires_grad_(), gain.detach().double().requires_grad_()
    expected = gated_scale_reference(exact_y, exact_gain, gate)
    expected.sum().backward()
    for mine, theirs in ((out, expected), (y.grad, exact_y.grad), (gain.grad, exact_gain.grad)):
        torch.testing.assert_close(
            mine.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max())
        )


def test_the_gated_scaling_of_no_rows_and_of_rows_out_of_order() -> None:
    gain = torch.rand(8, requires_grad=True)
    gated_scale(torch.rand(2, 0, 8), gain, torch.rand(2, 0, 1)).sum().backward()
    assert not gain.grad.any()
    y, gate = torch.rand(3, 2, 8).transpose(0, 1), torch.rand(2, 3, 1)
    torch.testing.assert_close(gated_scale(y, gain, gate), gated_scale_reference(y, gain, gate))


def test_the_gated_scaling_keeps_one_wide_tensor() -> None:
    y, gain = torch.randn(64, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    assert saved_by(lambda: gated_scale(y, gain)) >= {t.untyped_storage().data_ptr() for t in (y, gain)}
    assert len(saved_by(lambda: gated_scale(y, gain))) == 3  # and the gates, one number a token


@pytest.mark.parametrize("base", ["lora", "adalora", "propulsion"])
def test_torch_func_differentiates_a_routed_model_as_autograd_does(base: str) -> None:
    extra = {"total_step": 5} if base == "adalora" else {}
    model = routed(llama(), base=base, **extra).eval()
    parameters, ids = dict(trainable(model)), tokens()

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, kwargs={"input_ids": ids, "labels": ids}).loss

    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def saved_by(call: object) -> set[int]:
    """Storages that autograd keeps for a call."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()  # type: ignore[operator]
    assert out is not None
    return set(kept)


def test_lora_fa_keeps_the_rank_r_product_and_not_its_input() -> None:
    given = operands()
    x = given["x"].untyped_storage().data_ptr()
    assert x in saved_by(lambda: gated_linear(**given))
    frozen = {**given, "a": given["a"].detach()}
    assert x not in saved_by(lambda: gated_linear(**frozen))


def test_dropout_keeps_one_bit_per_element_and_no_dropped_copy() -> None:
    given = operands(shape=(64, 32))
    inputs = {v.untyped_storage().data_ptr() for v in given.values()}
    size = {}

    def pack(tensor: Tensor) -> Tensor:
        size[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gated_linear(**given, dropout=mask_for(given["x"], 0.5))
    rank_r, mask = 64 * 32 * 2 * 8, given["x"].numel() // 8
    assert sum(n for pointer, n in size.items() if pointer not in inputs) == rank_r + mask


@pytest.mark.parametrize("base", ["lora", "adalora"])
def test_adapted_layers_take_the_fused_path_and_agree_with_pefts(base: str) -> None:
    extra = {"total_step": 5} if base == "adalora" else {}
    model = routed(llama(), base=base, **extra)
    layer = model.get_base_model().model.layers[0].self_attn.o_proj  # shared: no gate in the way
    fused = {"lora": FusedLoraLinear, "adalora": FusedSVDLinear}[base]
    assert type(layer) is fused
    x = torch.randn(2, 4, 32)
    name = "GatedLinear"
    assert name in type(layer(x).grad_fn.next_functions[0][0]).__name__ + type(layer(x).grad_fn).__name__
    torch.testing.assert_close(layer(x), fused.__mro__[1].forward(layer, x))


def test_a_hooked_base_layer_is_still_called() -> None:
    model = routed(llama()).train()
    layer, seen = model.get_base_model().model.layers[0].self_attn.o_proj, []
    expected = model(tokens()).logits
    layer.base_layer.register_forward_hook(lambda *a: seen.append(1))
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert seen


@pytest.mark.parametrize("base", ["lora", "lora_fa", "adalora"])
def test_autocast_agrees_with_full_precision(base: str) -> None:
    extra = {"total_step": 5} if base == "adalora" else {}
    model = routed(llama(), base=base, **extra).train()
    ids = tokens()
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids, labels=ids).loss
    half.backward()
    torch.testing.assert_close(half.float(), full, rtol=3e-2, atol=3e-2)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for n, p in trainable(model).items() if "_B" in n)


@pytest.mark.parametrize("base", ["lora", "lora_fa"])
def test_compiling_breaks_no_graph_and_changes_nothing(base: str) -> None:
    model = routed(llama(), base=base).eval()
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.999])
def test_masks_keep_the_right_share_and_are_independent(p: float) -> None:
    torch.manual_seed(0)
    x = torch.zeros(999, 1001)  # no multiple of a word
    first, second = (spread(DropoutMask.draw(x, p).bits, x.shape, x.dtype) for _ in range(2))
    sd = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(first.mean().item() - (1 - p)) < 5 * sd + 2**-16
    assert abs((first * second).mean().item() - (1 - p) ** 2) < 10 * sd + 2**-15
    assert abs((first[:, 1:] * first[:, :-1]).mean().item() - (1 - p) ** 2) < 10 * sd + 2**-15
    assert set(first.unique().tolist()) <= {0.0, 1.0}


def test_masks_come_from_the_global_generator() -> None:
    x = torch.zeros(10, 10)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    first = DropoutMask.draw(x, 0.5).bits
    assert not torch.equal(first, DropoutMask.draw(x, 0.5).bits)
    torch.random.set_rng_state(state)
    assert torch.equal(first, DropoutMask.draw(x, 0.5).bits)


@pytest.mark.parametrize("gate", ["none", "token"])
def test_what_a_gpu_leaves_to_autograd_equals_the_reference(gate: str) -> None:
    given = operands()
    grads = []
    for composed in (True, False):
        if composed:
            m = None if gate == "none" else GATES[gate].reshape(-1, 1)
            out = low_rank._composed(
                given["x"].view(-1, 5), given["weight"], given["bias"], given["a"], given["b"], m, 1.5
            ).view(2, 3, 4)
        else:
            out = reference(given, GATES[gate], 1.5, None)
        weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape)
        grads.append((out, *torch.autograd.grad((out * weights).sum(), [given[n] for n in ("x", "a", "b")])))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_of_bytes_is_packed_and_spread_without_loss(p: float) -> None:
    kept = torch.rand(64, 8, generator=torch.Generator().manual_seed(1)) > p
    bits = kept.to(torch.uint8).mul_(_places(torch.device("cpu"))).sum(-1, dtype=torch.uint8)
    assert torch.equal(spread(bits, kept.shape, torch.float32), kept.float())

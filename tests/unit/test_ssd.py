"""The scan of Mamba-2 against a loop over the steps in float64, and against Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from monkeyjump.mamba import ssd_scan

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def inputs(batch=2, length=150, heads=6, width=4, groups=2, states=5, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    dt = torch.nn.functional.softplus(torch.randn(batch, length, heads) - 1)
    shared = [torch.randn(batch, length, groups, states) for _ in range(2)]
    tensors = [torch.randn(batch, length, heads, width), dt, -torch.arange(1.0, heads + 1), *shared]
    tensors += [torch.randn(heads), torch.randn(batch, heads, width, states)]
    return [t.to(dtype) for t in tensors]


def loop(x, dt, A, B, C, D, h) -> tuple[Tensor, Tensor]:
    per_group, ys = x.shape[2] // B.shape[2], []
    B, C = (t.repeat_interleave(per_group, 2) for t in (B, C))
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        h = decay * h + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(ys, 1), h


def scan(x, dt, A, B, C, D, first) -> tuple[Tensor, Tensor]:
    return ssd_scan(x, dt, A, B, C, D, first, return_last_state=True)


def outcome(function, tensors: list[Tensor]) -> list[Tensor]:
    outputs = function(*tensors)
    loss = sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outputs)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, tensors)]


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for name, f, e in zip(("y", "last", *NAMES), found, expected, strict=True):
        assert f.shape == e.shape, name
        error = float((f.double() - e).abs().max() / e.abs().max())
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("length", [1, 7, 64, 150])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_output_last_state_and_every_gradient(length: int, groups: int) -> None:
    tensors = inputs(length=length, groups=groups)
    assert_near(outcome(scan, leaves(tensors)), outcome(loop, leaves(tensors, torch.float64)))


def test_strong_decay_costs_no_precision() -> None:
    """Sums of dt A over a chunk reach -4000, where float32 is exact to 2e-4 only."""
    tensors = inputs(heads=64, groups=1)
    assert_near(outcome(scan, leaves(tensors)), outcome(loop, leaves(tensors, torch.float64)))


def test_gradcheck_in_float64() -> None:
    tensors = leaves(inputs(batch=1, length=66, heads=2, width=2, groups=1, states=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)
    assert_near(outcome(scan, tensors), outcome(loop, tensors), 1e-13)


@pytest.mark.parametrize("chunk", [64, 256])
def test_against_hugging_face(chunk: int) -> None:
    def theirs(x, dt, A, B, C, D, first):
        return mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D, initial_states=first, return_final_states=True)

    tensors = inputs()
    # both are float32; theirs is up to 1e-5 off by itself
    assert_near(outcome(scan, leaves(tensors)), [t.double() for t in outcome(theirs, leaves(tensors))], 3e-5)


def test_half_precision_keeps_a_state_in_float32() -> None:
    tensors = [t.bfloat16() for t in inputs()]
    y, last = scan(*tensors)
    expected = loop(*(t.double() for t in tensors))
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(last.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-2, atol=1e-2)


def test_two_parts_are_the_whole() -> None:
    *tensors, first = inputs()
    whole, last = scan(*tensors, first)
    parts = []
    for here in (slice(0, 71), slice(71, 150)):
        part = [t[:, here] if t.dim() > 2 else t for t in tensors]
        y, first = scan(*part, first)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [{"batch": 0}, {"length": 0}], ids=str)
def test_nothing_to_scan(size: dict) -> None:
    tensors = inputs(**size)
    y, last = scan(*tensors)
    assert y.shape == tensors[0].shape
    torch.testing.assert_close(last, tensors[-1])


def test_compile_without_a_break() -> None:
    tensors = leaves(inputs())
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    assert_near(outcome(compiled, tensors), [t.double() for t in outcome(scan, tensors)])


def test_a_second_differentiation_is_refused() -> None:
    x, *rest = leaves(inputs(length=9))
    (gradient,) = torch.autograd.grad(scan(x, *rest)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": torch.zeros(2, 9, 4, 5)}, "the 6 heads of x must divide among the 4 groups of B"),
        ({"dt": torch.zeros(2, 9)}, r"dt has the shape \[2, 9\].* must have \[2, 9, 6\]"),
        ({"x": torch.zeros(2, 9, 6)}, r"x must be \[B, L, H, P\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    tensors = dict(zip(NAMES, inputs(length=9)))
    with pytest.raises(ValueError, match=message):
        ssd_scan(**{**tensors, **change})

"""The scan of Mamba-2 against a loop over the steps in float64, and against Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from monkeyjump.mamba import ssd_scan
from monkeyjump.mamba.ssd import blocks, op

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


@pytest.mark.parametrize("weakest", [-1.0, -1000.0])
def test_strong_decay_costs_no_precision(weakest: float) -> None:
    """Sums of dt A over a chunk reach -4000 (-20,000), where float32 is exact to 2e-4 (2e-3) only."""
    tensors = inputs(heads=64, groups=1)
    tensors[2].clamp_(max=weakest)
    assert_near(outcome(scan, leaves(tensors)), outcome(loop, leaves(tensors, torch.float64)))


def test_gradcheck_in_float64() -> None:
    tensors = leaves(inputs(batch=1, length=66, heads=2, width=2, groups=1, states=2, dtype=torch.float64))
    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)
    assert_near(outcome(scan, tensors), outcome(loop, tensors), 1e-13)


@pytest.mark.parametrize("limit", [1, 2 * 2 * 6 * 64 * 4], ids=["a chunk at a time", "two chunks at a time"])
def test_blocks_of_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", -(-limit // torch.get_num_threads()))
    tensors = inputs(length=5 * 64 + 3)
    assert_near(outcome(scan, leaves(tensors)), outcome(loop, leaves(tensors, torch.float64)))


def test_without_skip_and_first_state() -> None:
    x, dt, A, B, C, D, first = inputs()

    def bare(*some: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan(*some, return_last_state=True)

    def expected(*some: Tensor) -> tuple[Tensor, Tensor]:
        return loop(*some, torch.zeros_like(D, dtype=some[0].dtype), torch.zeros_like(first, dtype=some[0].dtype))

    of_bare = outcome(bare, leaves([x, dt, A, B, C]))
    assert torch.equal(ssd_scan(x, dt, A, B, C), of_bare[0])
    of_loop = outcome(expected, leaves([x, dt, A, B, C], torch.float64))
    for found, wanted in zip(of_bare, of_loop, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("which", [0, 1], ids=["y", "last"])
def test_only_one_output_is_used(which: int) -> None:
    found, wanted = (
        torch.autograd.grad(function(*some)[which].square().sum(), some, materialize_grads=True)
        for function, some in ((scan, leaves(inputs())), (loop, leaves(inputs(), torch.float64)))
    )
    for name, f, w in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(f.double(), w, rtol=0, atol=1e-5 * float(w.abs().max()), msg=name)


def test_views_as_a_mixer_passes_them() -> None:
    x, dt, A, B, C, D, first = inputs()
    together = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2), dt], 2)

    def split(function, joined: Tensor) -> Tensor:
        parts = joined.split([24, 10, 10, 6], 2)
        x_, b, c = (p.unflatten(2, shape) for p, shape in zip(parts, ((6, 4), (2, 5), (2, 5))))
        rest = [t.to(joined.dtype) for t in (A, D, first)]
        return function(x_, parts[3], rest[0], b, c, *rest[1:])[0]

    found, wanted = (
        torch.autograd.grad(split(function, t).sum(), t)[0]  # of a sum: a gradient without strides
        for function, t in zip((scan, loop), (*leaves([together]), *leaves([together], torch.float64)))
    )
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


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


def test_half_precision_gradients() -> None:
    tensors = leaves(inputs(), torch.bfloat16)
    found, expected = outcome(scan, tensors), outcome(loop, leaves(tensors, torch.float64))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 7
    assert_near(found, expected, 2e-2)


def test_autocast_does_not_round() -> None:
    tensors = leaves(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(scan, tensors)
    assert_near(found, outcome(loop, leaves(tensors, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_and_dtypes_without_values(dtype: torch.dtype) -> None:
    """What `torch.compile` and the meta device are told equals what is computed."""
    tensors = leaves(inputs(length=70), dtype)
    torch.library.opcheck(op.scan, tensors, test_utils=("test_schema", "test_faketensor"))
    starts = op.scan(*tensors)[2].detach()
    grads = torch.randn_like(tensors[0]), torch.randn(tensors[-1].shape)
    torch.library.opcheck(
        op.scan_backward, (*tensors[:-1], starts, *grads), test_utils=("test_schema", "test_faketensor")
    )


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
    tensors = leaves(inputs(**size))
    y, last = scan(*tensors)
    assert y.shape == tensors[0].shape
    torch.testing.assert_close(last, tensors[-1])
    grads = torch.autograd.grad(y.sum() + last.sum(), tensors)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    torch.testing.assert_close(grads[-1], torch.ones_like(last))


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

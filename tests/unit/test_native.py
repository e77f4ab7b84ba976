"""The compiled kernels against float64, at every number of rows, columns and threads that takes another way through."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from monkeyjump import native
from monkeyjump.ops import DropoutMask, gated_delta, gated_linear, gated_scale, gated_scale_reference
from monkeyjump.ops.dropout import spread
from monkeyjump.routing.ema import CenterStatistics
from monkeyjump.routing.gates import gates_from_logits, route, similarity_logits

COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
needed = pytest.mark.skipif(not native.is_there(), reason="the kernels are not compiled here")
LARGE = 700  # rows: enough for several threads, and no multiple of four


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no compiler")
def test_they_are_compiled_where_there_is_a_compiler() -> None:
    assert native.is_there(), "install the package again: pip install -e ."


def test_they_can_be_switched_off() -> None:
    asked = "from monkeyjump import native; print(native.is_there())"
    done = subprocess.run(
        [sys.executable, "-c", asked], env={"MONKEYJUMP_NATIVE": "0"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def outcome(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients for a sum that weighs every element by itself."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True)]


@needed
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 3, 4, 9, LARGE])
def test_the_low_rank_update(rows: int, rank: int, dropout: float, threads: int) -> None:
    torch.manual_seed(0)
    x, a, b = leaf(rows, 24), leaf(rank, 24), leaf(40, rank)
    weight, bias, gate = torch.randn(40, 24), torch.randn(40), torch.rand(rows, 1)
    mask = DropoutMask.draw(x.detach(), dropout) if dropout else None
    assert native.serves_update(a, b, x, bias)
    keep = torch.ones(rows, 24) if mask is None else spread(mask.bits, x.shape, torch.float32) * mask.factor
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    added = (((exact[0] * keep.double()) @ exact[1].T) * (gate.double() * 1.5)) @ exact[2].T
    base = exact[0] @ weight.double().T + bias.double()
    for mine, theirs in (
        (outcome(gated_linear(x, weight, bias, a, b, gate, 1.5, mask), [x, a, b]), outcome(base + added, exact)),
        (outcome(gated_delta(x, a, b, gate, 1.5, mask), [x, a, b]), outcome(added, exact)),
    ):
        for found, expected in zip(mine, theirs):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@needed
def test_a_frozen_a_and_an_input_without_gradient_get_none() -> None:
    x, a, b = torch.randn(6, 16), torch.randn(2, 16), leaf(8, 2)
    (grad,) = torch.autograd.grad(gated_delta(x, a, b, None, 0.5).sum(), [b])
    expected = (x.double() @ a.double().T * 0.5).sum(0).expand(8, 2)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


@needed
def test_gates_of_another_dtype_are_read_as_what_they_are() -> None:
    x, a, b, gain, gate = leaf(6, 16), leaf(2, 16), leaf(8, 2), leaf(16), torch.rand(6, 1)
    for call, inputs in (
        (lambda m: gated_delta(x, a, b, m, 0.5), [x, a, b]),
        (lambda m: gated_scale(x, gain, m), [x, gain]),
    ):
        for one, other in zip(outcome(call(gate), inputs), outcome(call(gate.double()), inputs)):
            assert torch.equal(one, other)


def test_other_widths_dtypes_and_layouts_are_torchs() -> None:
    a, b, x = torch.randn(2, 16), torch.randn(8, 2), torch.randn(4, 16)
    for wrong in (x[:, :12], x.half(), x.T, x.to("meta"), x.to_sparse()):
        assert not native.serves(wrong)
    assert not native.serves_update(torch.randn(9, 16), torch.randn(8, 9), x)
    assert not native.serves_update(a, b[:6], x)


@needed
def test_threads_do_not_change_the_sums_from_run_to_run(threads: int) -> None:
    x, a, b = torch.randn(LARGE, 64), leaf(2, 64), leaf(64, 2)
    weight = torch.randn(64, 64)
    first, second = (outcome(gated_linear(x, weight, None, a, b), [a, b]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@needed
@pytest.mark.parametrize("gate", [None, "row", "token"])
@pytest.mark.parametrize("rows", [1, LARGE])
def test_the_gated_scaling(rows: int, gate: str | None, threads: int) -> None:
    torch.manual_seed(0)
    y, gain = leaf(2, rows, 24), leaf(24)
    m = {None: None, "row": torch.rand(2, 1, 1), "token": torch.rand(2, rows, 1)}[gate]
    exact = [t.detach().double().requires_grad_() for t in (y, gain)]
    expected = gated_scale_reference(exact[0], exact[1], None if m is None else m.double())
    for found, theirs in zip(outcome(gated_scale(y, gain, m), [y, gain]), outcome(expected, exact)):
        torch.testing.assert_close(found.double(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@needed
@pytest.mark.parametrize("gate_norm", ["none", "one", "k"])
@pytest.mark.parametrize(("centers", "experts"), [(1, 1), (1, 2), (2, 2), (2, 5), (3, 3), (7, 7)])
@pytest.mark.parametrize("rows", [1, 6, LARGE])
def test_the_routing_decision(rows: int, centers: int, experts: int, gate_norm: str, threads: int) -> None:
    torch.manual_seed(0)
    h, c = torch.randn(rows, 32) * torch.logspace(-6, 6, rows)[:, None], torch.randn(centers, 32)
    h[0] = 0  # equally near to all
    rule = (experts, "cosine", 0.3, 2, gate_norm)
    assert native.serves(h, c)
    gates, chosen, logits = route(h, c, *rule)
    exact, expected, similar = route(h.double(), c.double(), *rule)  # torch's operations
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(logits, similar.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gates, exact.float(), rtol=1e-5, atol=1e-6)


@needed
def test_states_that_are_no_numbers_choose_as_torch_does() -> None:
    h, c = torch.randn(5, 32), torch.randn(4, 32)
    h[2, 7] = torch.nan
    mine = route(h, c, 4, "cosine", 1.0, 2, "k")
    theirs = gates_from_logits(similarity_logits(h, c, "cosine"), 2, "k")
    assert torch.equal(mine[1], theirs[1])
    torch.testing.assert_close(mine[0], theirs[0], equal_nan=True)


@needed
@pytest.mark.parametrize("space", ["sphere", "raw"])
@pytest.mark.parametrize("centers", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5, LARGE])
def test_the_statistics_of_centers(rows: int, centers: int, space: str, threads: int) -> None:
    torch.manual_seed(0)
    h, assigned = torch.randn(rows, 32), torch.rand(rows, centers) < 0.6
    if rows > 1:
        h[1, 3], h[4, 0] = torch.inf, torch.nan  # rows that must not count
        assigned[:5] = True
        assigned[2] = False
    counted = assigned & h.isfinite().all(-1, keepdim=True)
    states = torch.where(h.isfinite(), h, 0).double()
    states = torch.nn.functional.normalize(states, dim=-1) if space == "sphere" else states
    found = CenterStatistics.of(h, assigned, space)
    assert torch.equal(found.counts, counted.sum(0).float())
    torch.testing.assert_close(found.sums.double(), counted.double().T @ states, rtol=1e-5, atol=1e-5)


@needed
def test_dropout_masks_depend_on_the_seed_and_on_nothing_else(threads: int) -> None:
    bits = native.draw_bits(7, 40_000, 5_000)
    before, torch_threads = bits.clone(), torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(native.draw_bits(7, 40_000, 5_000), before)
    torch.set_num_threads(torch_threads)
    assert not torch.equal(native.draw_bits(8, 40_000, 5_000), before)

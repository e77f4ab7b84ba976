"""The scans of Mamba, patched models, masks, shrinking and allocation on a GPU, against float64 and the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monkeyjump.allocation import allocate_peft, attach_peft, taylor_importance
from monkeyjump.mamba import patched_mamba, selective_scan, ssd_scan
from monkeyjump.mamba.scan import choice, cuda
from tiny import tokens
from tiny_mamba import MODELS

GPU = "cuda"
theirs = pytest.param("cuda", marks=pytest.mark.skipif(not cuda.INSTALLED, reason="mamba-ssm is not installed"))


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def scan_inputs(length: int) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias in float64 on the CPU."""
    torch.manual_seed(0)
    wide = [torch.randn(2, 24, length) for _ in range(3)]
    narrow = [torch.randn(2, 16, length) for _ in range(2)]
    a = -torch.arange(1.0, 17).repeat(24, 1)
    tensors = (wide[0], wide[1], a, *narrow, torch.randn(24), wide[2], torch.randn(24) - 2)
    return [t.double() for t in tensors]


def ssd_inputs(length: int) -> list[Tensor]:
    """x, dt, A, B, C, D in float64 on the CPU."""
    torch.manual_seed(0)
    dt = F.softplus(torch.randn(2, length, 6) - 1)
    shared = [torch.randn(2, length, 2, 8) for _ in range(2)]
    tensors = (torch.randn(2, length, 6, 16), dt, -torch.arange(1.0, 7), *shared, torch.randn(6))
    return [t.double() for t in tensors]


def outcome(function, tensors: list[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Output, last state and every gradient, back on the CPU in float64."""
    leaves = [t.to(device, dtype).requires_grad_() for t in tensors]
    y, last = function(*leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    grads = torch.autograd.grad((y * weights).sum(), leaves)
    return [t.detach().cpu().double() for t in (y, last, *grads)]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for number, (f, e) in enumerate(zip(found, expected, strict=True)):
        error = float((f - e).abs().max() / e.abs().max().clamp(min=1e-6))
        assert error < tolerance, (number, error)


def selective(backend: str):
    return lambda *tensors: selective_scan(*tensors, True, backend, return_last_state=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("length", [1, 50, 300])
@pytest.mark.parametrize("backend", ["chunked", theirs])
def test_selective_scan(backend: str, length: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = scan_inputs(length)
    if dtype == torch.bfloat16:  # what the rounding of the inputs does is not the scan's
        tensors = [t.to(dtype).double() for t in tensors]
    expected = outcome(selective("reference"), tensors, "cpu", torch.float64)
    assert_near(outcome(selective(backend), tensors, GPU, dtype), expected, tolerance)


def test_automatic_choice_is_the_fastest_that_is_there() -> None:
    u = torch.zeros(1, 8, 4, device=GPU)
    assert choice.choose("auto", u, 16, continued=False) == ("cuda" if cuda.INSTALLED else "chunked")
    assert choice.choose("auto", u, 16, continued=True) == "chunked"


@pytest.mark.parametrize("length", [1, 64, 300])
def test_scan_of_mamba2(length: int) -> None:
    function = lambda *tensors: ssd_scan(*tensors, return_last_state=True)  # noqa: E731
    tensors = ssd_inputs(length)
    expected = outcome(function, tensors, "cpu", torch.float64)
    assert_near(outcome(function, tensors, GPU, torch.float32), expected, 1e-5)


MAMBAS = ("mamba", "mamba2", "falcon_mamba")


def loss_and_grads(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = tokens(3, 40).to(next(model.parameters()).device)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    model.zero_grad()
    out = model.train()(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    model.eval()
    return out.logits.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", MAMBAS)
def test_patched_model_on_the_gpu_is_the_patched_one_on_the_cpu(name: str) -> None:
    model = MODELS[name]()
    found = []
    for device in ("cpu", GPU):
        with patched_mamba(copy.deepcopy(model).to(device)) as patched:
            found.append(loss_and_grads(patched))
    (expected, wanted), (logits, grads) = found
    assert_near([logits], [expected], 1e-5)
    for parameter, grad in wanted.items():
        assert_near([grads[parameter]], [grad], 1e-4)


@pytest.mark.parametrize("name", MAMBAS)
def test_patched_generation_with_a_cache_is_generation_without(name: str) -> None:
    ids = tokens(2, 9).to(GPU)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with patched_mamba(MODELS[name]().to(GPU)) as model:
        rows = [
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings, use_cache=use) for use in (True, False)
        ]
    assert rows[0].tolist() == rows[1].tolist()


@pytest.mark.parametrize("name", [*MAMBAS, "llama"])
def test_allocated_adapters_train_on_the_gpu(name: str) -> None:
    model = MODELS[name]().to(GPU)
    ids = tokens().to(GPU)
    rows = {"input_ids": ids, "labels": ids}
    scores = taylor_importance(model, [rows])
    plan = allocate_peft(model, scores, peft_application_ratio=0.6, peft_r=4)
    attach_peft(model, plan, rows)
    model(**rows).loss.backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters() if p.requires_grad)

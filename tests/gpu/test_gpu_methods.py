"""Every routed method and every mixture on a GPU: what it computes there is what it computes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_methods import CORE, methods, plain_model, routed_model
from torch import Tensor, nn

from moe_methods import METHODS as MIXTURES
from moe_methods import mixture, told
from monkeyjump import CenterUpdate, initialize_centers
from monkeyjump.ops import DropoutMask
from monkeyjump.tuner.model import routers
from tiny import VOCAB, llama, routed, tokens, trainable

GPU = "cuda"
# PEFT computes them with kernels of their own, or in an order of its own, on a GPU
MAKERS: dict[str, Callable[..., PeftModel]] = {
    **{f"mj-{base}": lambda base=base, **own: routed_model(base, **own) for base in methods()},
    **{name: lambda name=name, **own: mixture(name, **own) for name in MIXTURES},
}
every = pytest.mark.parametrize("name", MAKERS)
few = pytest.mark.parametrize("name", [*(f"mj-{base}" for base in CORE), "moelora", "mixlora", "more", "moa_sparse"])


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def batch(model: nn.Module, seed: int = 3, length: int = 9) -> dict[str, Tensor]:
    ids = tokens(2, length, seed)
    inputs = {"input_ids": ids, "labels": ids, **told(model, ids)}
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs.items()}


def outcome(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients; modes stay as they are, for what is random in training differs between devices."""
    model.zero_grad()
    out = model(**batch(model))
    out.loss.backward()
    grads = {n: p.grad.cpu() for n, p in trainable(model).items() if p.grad is not None}
    return out.logits.detach().cpu(), grads


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < tolerance, (name, error)


def on_both(name: str) -> tuple[PeftModel, PeftModel]:
    return MAKERS[name](), MAKERS[name]().to(GPU)


def unless_plain_fails(name: str, action: Callable[[PeftModel], Any]) -> None:
    """Skip where the method's plain adapters cannot do it on a GPU either."""
    if not name.startswith("mj-"):
        return
    try:
        action(plain_model(name.removeprefix("mj-")).to(GPU))
    except Exception as error:
        pytest.skip(f"plain {name[3:]} cannot do it: {type(error).__name__}: {str(error)[:80]}")


@every
def test_logits_and_gradients_are_those_of_the_cpu(name: str) -> None:
    unless_plain_fails(name, outcome)
    cpu, gpu = on_both(name)
    (expected, cpu_grads), (found, gpu_grads) = outcome(cpu), outcome(gpu)
    assert_near(found, expected, 1e-4, "logits")
    assert gpu_grads.keys() == cpu_grads.keys()
    for parameter, grad in cpu_grads.items():
        assert_near(gpu_grads[parameter], grad, 1e-3, parameter)


@every
def test_bfloat16_model_stays_near_float32(name: str) -> None:
    unless_plain_fails(name, lambda plain: outcome(plain.to(torch.bfloat16)))
    exact, half = MAKERS[name]().to(GPU), MAKERS[name]().to(torch.bfloat16).to(GPU)
    (_, wanted), (_, grads) = outcome(exact), outcome(half)
    losses = [model(**batch(model)).loss.item() for model in (exact, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert grads.keys() == wanted.keys()
    assert all(grad.isfinite().all() for grad in grads.values())


@few
def test_three_steps_with_moving_centers_end_as_on_the_cpu(name: str) -> None:
    ends = []
    for model in on_both(name):
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05)
        if name.startswith("mj-"):
            CenterUpdate(every=1, until=10).attach(model, optimizer, total_steps=10)
        model.train()
        for seed in range(3):
            optimizer.zero_grad()
            model(**batch(model, seed)).loss.backward()
            optimizer.step()
        moved = centers(model) if name.startswith("mj-") else []
        ends.append([t.detach().cpu() for t in (*trainable(model).values(), *moved)])
    for number, (cpu, gpu) in enumerate(zip(*ends, strict=True)):
        assert_near(gpu, cpu, 1e-3, str(number))


def centers(model: PeftModel) -> list[Tensor]:
    return [router.centers["default"] for router in routers(model)]


def test_kmeans_on_the_gpu_gives_the_centers_of_the_cpu() -> None:
    found = []
    for device in ("cpu", GPU):
        model = routed(llama(), center_init="kmeans").to(device)
        initialize_centers(model, [{"input_ids": tokens(4, 30, seed).to(device)} for seed in range(3)], seed=0)
        found.append([center.cpu() for center in centers(model)])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)


@few
def test_generation_with_a_cache_is_generation_without(name: str) -> None:
    model = MAKERS[name]().to(GPU)
    ids = tokens(2, 7).to(GPU)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB + 1}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **told(model, ids)}
    cached, whole = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
    assert cached.tolist() == whole.tolist()


@few
def test_saved_on_the_gpu_loads_on_the_cpu(name: str, tmp_path: Path) -> None:
    cpu, gpu = on_both(name)
    gpu.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    inputs = batch(cpu)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, cpu.eval()(**inputs).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [f"mj-{base}" for base in CORE if base != "propulsion"])
def test_checkpointing_draws_the_same_dropout_again(name: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = MAKERS[name](lora_dropout=0.3).to(GPU)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        grads.append(outcome(model.train())[1])
    for parameter, grad in grads[0].items():
        assert_near(grads[1][parameter], grad, 1e-4, parameter)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_mask_drops_the_share_that_was_asked_for(p: float) -> None:
    x = torch.ones(1000, 1003, device=GPU)
    kept = DropoutMask.draw(x, p).keep(torch.float32)
    assert kept.shape == x.shape
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert float((kept > 0).float().mean()) == pytest.approx(1 - p, abs=0.003)
    assert not torch.equal(kept, DropoutMask.draw(x, p).keep(torch.float32))


def test_scaler_skips_a_step_and_its_statistics() -> None:
    model = routed(llama()).to(GPU).train()
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.01)
    schedule = CenterUpdate(every=1, until=100).attach(model, optimizer, total_steps=100)
    scaler, moved = torch.amp.GradScaler(GPU, init_scale=2.0**10), []
    for factor in (1.0, float("inf"), 1.0):
        before = [center.clone() for center in centers(model)]
        optimizer.zero_grad()
        with torch.autocast(GPU, dtype=torch.float16):
            loss = model(**batch(model)).loss
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, centers(model))))
    assert moved == [True, False, True]
    assert schedule.completed == 2


def peak_of_a_step(model: PeftModel) -> int:
    """Bytes above what the model and a first step's gradients take."""
    ids = torch.randint(1, VOCAB, (8, 512), device=GPU)
    model.to(GPU).train()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
    return torch.cuda.max_memory_allocated() - before


def test_routed_lora_takes_less_memory_than_plain_lora() -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    shape |= {"max_position_embeddings": 512, "num_hidden_layers": 3}
    base = lambda: llama(**shape).to(torch.bfloat16)  # noqa: E731
    plain = peak_of_a_step(plain_model("lora", base(), lora_dropout=0.05))
    assert peak_of_a_step(routed_model("lora", base(), lora_dropout=0.05)) < plain


def test_compiled_model_gives_the_logits_of_the_eager_one() -> None:
    model = routed(llama()).to(GPU).eval()
    ids = tokens().to(GPU)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = torch.compile(model)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

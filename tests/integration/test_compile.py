"""torch.compile without graph breaks, in training and in generation, equal to eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.generation.configuration_utils import CompileConfig

from monkeyjump import CenterUpdate
from monkeyjump.tuner.model import routers
from tiny import left_padded, llama, routed, tokens, trainable

TASKS = {"task_experts": {0: ["q_proj"], 5: ["k_proj", "v_proj"]}}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(base: str = "lora", granularity: str = "token", **changes: Any) -> nn.Module:
    tasks = TASKS if granularity == "task" else {}
    own = {"total_step": 10} if base == "adalora" else {}
    return routed(
        llama(num_hidden_layers=1), base=base, granularity=granularity, task_type="CAUSAL_LM", **tasks, **own, **changes
    )


def batch(granularity: str = "token", seed: int = 3) -> dict[str, Tensor]:
    ids = tokens(2, 9, seed=seed)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, :2] = 0
    labels[:, :4] = -100
    tasks = {"task_ids": torch.tensor([0, 5])} if granularity == "task" else {}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **tasks}


def trained(model: nn.Module, forward: Callable[..., Any], granularity: str) -> list[Tensor]:
    """Losses, gradients and gathered statistics of two micro-batches."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.0)
    schedule = CenterUpdate(every=100, until=100).attach(model, optimizer, total_steps=10)
    model.train()
    losses = []
    for seed in range(2):
        losses.append(forward(**batch(granularity, seed)).loss)
        losses[-1].backward()
    found = [loss.detach() for loss in losses] + [p.grad for p in trainable(model).values()]
    pending = [router.pending["default"] for router in routers(model) if granularity != "task"]
    schedule.detach()
    return [*found, *(s.sums for s in pending), *(s.counts for s in pending)]


@pytest.mark.proves("integration", "torch.compile, training without graph breaks")
@pytest.mark.parametrize(
    ("base", "granularity"),
    [
        ("lora", "token"),
        ("lora", "prompt_end"),
        ("lora", "task"),
        pytest.param("lora", "last", marks=pytest.mark.slow),
        pytest.param("lora_fa", "token", marks=pytest.mark.slow),
        pytest.param("adalora", "token", marks=pytest.mark.slow),
        pytest.param("propulsion", "token", marks=pytest.mark.slow),
        pytest.param("vera", "token", marks=pytest.mark.slow),
        pytest.param("ia3", "token", marks=pytest.mark.slow),
    ],
)
def test_compiled_training_equals_eager(base: str, granularity: str) -> None:
    eager, compiled = model_of(base, granularity), model_of(base, granularity)
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    expected, found = trained(eager, eager, granularity), trained(compiled, forward, granularity)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_adapter_switched_after_compiling() -> None:
    model = model_of().eval()
    forward = torch.compile(model, backend="eager", fullgraph=True)
    ids = tokens()
    with torch.no_grad():
        on = model(input_ids=ids).logits
        for _ in range(2):
            torch.testing.assert_close(forward(input_ids=ids).logits, on)
            with model.disable_adapter():
                torch.testing.assert_close(forward(input_ids=ids).logits, llama(num_hidden_layers=1)(ids).logits)
        for router in routers(model):
            router.set_centers("default", -router.centers["default"])
        moved = model(input_ids=ids).logits
        assert not torch.allclose(moved, on)
        torch.testing.assert_close(forward(input_ids=ids).logits, moved)


@pytest.mark.parametrize(
    ("granularity", "change", "message"),
    [
        ("prompt_end", {"labels": torch.full((2, 9), -100)}, "every label of row"),
        ("task", {"task_ids": torch.tensor([0, 4])}, "task_experts does not map"),
        ("last", {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)}, "packed"),
    ],
)
def test_bad_batches_are_refused_by_compiled_code_too(granularity: str, change: dict, message: str) -> None:
    model = model_of(granularity=granularity).train()
    forward = torch.compile(model, backend="eager", fullgraph=True)
    given = {**batch(granularity), **change}
    with pytest.raises(ValueError, match=message):
        model(**given)
    with pytest.raises(RuntimeError, match=message):
        forward(**given)


@pytest.mark.proves("integration", "torch.compile, generate with a static cache")
@pytest.mark.parametrize("granularity", ["token", "last", "mean", "max", "prompt_end", "task"])
def test_compiled_decoding_gives_the_same_tokens(granularity: str) -> None:
    model = model_of(granularity=granularity, temperature=0.2).eval()
    given = left_padded([tokens(1, 9), tokens(1, 5, seed=9)])
    if granularity == "task":
        given["task_ids"] = torch.tensor([0, 5])
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 65}
    expected = model.generate(**given, **settings)
    compiling = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # transformers compiles on accelerators only
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = model.generate(**given, **settings, cache_implementation="static", compile_config=compiling)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert torch.equal(found, expected)

"""Generation: sequence decisions hold for the whole answer, and begin anew with an emptied cache.

Every cache, beams, mixed batches and prompts in pieces are in tests/integration.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monkeyjump import record_routing, routing_inputs
from tiny import llama, routed, tokens

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
SEQUENCE = ["last", "mean", "max", "prompt_end"]


def stepwise(model: object, ids: Tensor, steps: int) -> Tensor:
    """Greedy tokens from full forwards over the growing sequence, without a cache."""
    for _ in range(steps):
        logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("granularity", SEQUENCE)
def test_sequence_modes_decide_once_on_the_prompt(granularity: str) -> None:
    model = routed(llama(), granularity=granularity, temperature=0.2).eval()
    ids = tokens(2, 6)
    prompt_gates = []
    router = model.get_base_model().model.layers[1].jump_router
    hook = (
        model.get_base_model()
        .model.layers[1]
        .register_forward_pre_hook(lambda m, a, k: prompt_gates.append(k["mj_gates"]["default"]), with_kwargs=True)
    )
    with record_routing(model) as record:
        model.generate(input_ids=ids, **GREEDY)
    hook.remove()
    assert len(prompt_gates) == 8
    assert all(torch.equal(gates, prompt_gates[0]) for gates in prompt_gates)
    assert record.tokens[router.name] == 2  # one decision per row


def test_prompt_end_generates_the_same_without_a_cache_when_told_the_prompt() -> None:
    model = routed(llama(), granularity="prompt_end", temperature=0.2).eval()
    ids = tokens(2, 6)
    cached = model.generate(input_ids=ids, **GREEDY)
    with routing_inputs(model, prompt_lengths=torch.tensor([6, 6])):
        assert torch.equal(cached, stepwise(model, ids, 8))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_task_ids_route_forward_and_generate(task_type: str | None) -> None:
    model = routed(llama(), granularity="task", task_type=task_type).eval()
    ids = tokens(2, 5)
    zero, one = torch.tensor([0, 0]), torch.tensor([1, 1])
    assert not torch.equal(model(input_ids=ids, task_ids=zero).logits, model(input_ids=ids, task_ids=one).logits)
    with routing_inputs(model, task_ids=one):
        told = model.generate(input_ids=ids, num_beams=2, **GREEDY)
    assert told.shape == (2, 13)
    if task_type is not None:
        assert torch.equal(told, model.generate(input_ids=ids, task_ids=one, num_beams=2, **GREEDY))


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("granularity", SEQUENCE)
def test_generating_without_a_cache_keeps_the_prompts_decision_too(granularity: str, task_type: str | None) -> None:
    for seed in range(4):
        model = routed(llama(), seed=seed, granularity=granularity, task_type=task_type, temperature=0.1).eval()
        ids = tokens(2, 6, seed=seed)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        given = {"input_ids": ids, "attention_mask": mask, **GREEDY}
        assert torch.equal(model.generate(**given), model.generate(**given, use_cache=False))


@pytest.mark.parametrize("length", [1, 5])
def test_an_emptied_cache_decides_anew(length: int) -> None:
    from transformers import StaticCache

    model = routed(llama(), granularity="last", temperature=0.1).eval()
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=16)
    model(tokens(1, 4), past_key_values=cache)
    cache.reset()
    ids = tokens(1, length, seed=9)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids, use_cache=False).logits)

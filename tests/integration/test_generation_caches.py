"""Greedy tokens are the same with every cache, without one, and step by step, in every routing mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

from monkeyjump import routing_inputs
from tiny import SHAPE, left_padded, llama, routed, tokens

MODES = ["token", "last", "mean", "max", "prompt_end", "task"]
NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 65}
ROWS = [tokens(1, 9), tokens(1, 5, seed=9)]
TASKS = torch.tensor([0, 1])


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)).eval()


def gemma3() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


def routed_model(make: Any, granularity: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    base = make()
    base.set_attn_implementation(attention)
    return routed(base, granularity=granularity, temperature=0.2, task_type="CAUSAL_LM", **changes).eval()


def tasks(granularity: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    return {"task_ids": TASKS[rows]} if granularity == "task" else {}


def step_by_step(model: nn.Module, ids: Tensor, attention_mask: Tensor, told: dict[str, Any]) -> Tensor:
    """Greedy tokens from one full forward per token: the reference, which knows no cache."""
    for _ in range(NEW):
        mask = torch.nn.functional.pad(attention_mask, (0, ids.shape[1] - attention_mask.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with routing_inputs(model, **told):
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.proves("integration", "generate: dynamic, static and sliding-window caches")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("granularity", MODES)
@pytest.mark.parametrize("make", [llama, mistral, gemma3])
def test_every_cache_gives_the_tokens_of_full_forwards(make: Any, granularity: str, attention: str) -> None:
    model = routed_model(make, granularity, attention)
    batch = left_padded(ROWS)
    given = {**batch, **tasks(granularity), **GREEDY}
    told = {"task_ids": TASKS} if granularity == "task" else {"prompt_columns": 9}
    expected = step_by_step(model, batch["input_ids"], batch["attention_mask"], told)
    assert torch.equal(model.generate(**given), expected)
    assert torch.equal(model.generate(**given, use_cache=False), expected)
    assert torch.equal(model.generate(**given, cache_implementation="static"), expected)
    for number, row in enumerate(ROWS):  # and none of it depends on the other rows, or on padding
        one = {
            "input_ids": row,
            "attention_mask": torch.ones_like(row),
            **tasks(granularity, slice(number, number + 1)),
        }
        assert torch.equal(model.generate(**one, **GREEDY)[0, -NEW:], expected[number, -NEW:])


@pytest.mark.parametrize("granularity", MODES)
def test_beams_and_seeded_samples_are_the_same_with_every_cache(granularity: str) -> None:
    model = routed_model(gemma3, granularity)
    given = {**left_padded(ROWS), **tasks(granularity), **GREEDY}
    ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    for search in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 0}):
        found = []
        for way in ways:
            torch.manual_seed(3)
            found.append(model.generate(**{**given, **search, **way}))
        assert torch.equal(found[1], found[0])
        assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("granularity", ["last", "mean", "max", "prompt_end"])
def test_deciding_anew_for_every_token_would_be_noticed(granularity: str) -> None:
    model = routed_model(mistral, granularity)
    batch = left_padded(ROWS)
    anew = step_by_step(model, batch["input_ids"], batch["attention_mask"], {})
    assert not torch.equal(model.generate(**batch, **GREEDY), anew)

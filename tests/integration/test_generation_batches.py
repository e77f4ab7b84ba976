"""Mixed batches in generation, and encoder-decoders, whose decoder has a prompt of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from monkeyjump import MonkeyJumpConfig
from tiny import VOCAB, left_padded, llama, routed, tokens

MODES = ["token", "last", "mean", "max", "prompt_end", "task"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 65}
SEARCHES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
NAMES = ["default", "__base__", "other"]
ROWS = [tokens(1, 9), tokens(1, 5, seed=9), tokens(1, 7, seed=4)]


def two_adapters(granularity: str) -> Any:
    settings = {"granularity": granularity, "temperature": 0.2}
    model = routed(llama(), task_type="CAUSAL_LM", **settings)
    other = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False, "center_init": "random", "center_seed": 7}
    torch.manual_seed(5)
    model.add_adapter("other", MonkeyJumpConfig(**settings, **other, top_k=1))
    return model.eval()


def alone(model: Any, row: Tensor, name: str, **given: Any) -> Tensor:
    given = {"input_ids": row, "attention_mask": torch.ones_like(row), **given}
    if name == "__base__":
        with model.disable_adapter():
            given.pop("task_ids", None)
            return model.generate(**given)
    model.set_adapter(name)
    return model.generate(**given)


@pytest.mark.proves("integration", "generate: adapter_names, one adapter per row")
@pytest.mark.parametrize("granularity", MODES)
def test_every_row_of_a_mixed_batch_generates_with_its_own_adapter(granularity: str) -> None:
    model = two_adapters(granularity)
    ids = torch.tensor([0, 1, 2])
    for search in SEARCHES:
        given = {**GREEDY, **search}
        tasks = {"task_ids": ids} if granularity == "task" else {}
        model.set_adapter("default")
        mixed = model.generate(**left_padded(ROWS), adapter_names=NAMES, **tasks, **given)
        per_row = len(mixed) // len(ROWS)
        for number, (row, name) in enumerate(zip(ROWS, NAMES)):
            tasks = {"task_ids": ids[number : number + 1]} if granularity == "task" else {}
            expected = alone(model, row, name, **tasks, **given)
            assert torch.equal(mixed[number * per_row : (number + 1) * per_row, -8:], expected[:, -8:])


def t5() -> nn.Module:
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **size)).eval()


def bart() -> nn.Module:
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    size = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=VOCAB, **layers, **size, pad_token_id=0, init_std=0.3)
    return BartForConditionalGeneration(config).eval()


SELF_ATTENTION = {
    t5: ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v"],
    bart: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
}


@pytest.mark.parametrize("granularity", MODES)
@pytest.mark.parametrize("make", [t5, bart])
def test_decoder_beside_an_encoder_generates_the_same_without_a_cache(make: Any, granularity: str) -> None:
    settings = {"granularity": granularity, "temperature": 0.1, "task_type": "SEQ_2_SEQ_LM"}
    model = routed(make(), target_modules=SELF_ATTENTION[make], **settings).eval()
    ids = tokens(2, 5)
    ids[0, 4] = 0
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), **GREEDY, "max_new_tokens": 12}
    if granularity == "task":
        given["task_ids"] = torch.tensor([0, 1])
    for search in ({}, {"num_beams": 2}):
        cached = model.generate(**given, **search)
        assert torch.equal(model.generate(**given, **search, use_cache=False), cached)
        if granularity != "task":
            single = model.generate(input_ids=ids[:1, :4], **{**GREEDY, "max_new_tokens": 12}, **search)
            assert torch.equal(single[0], cached[0])

"""Tiny random models and batches that the tests share."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from monkeyjump import MonkeyJumpConfig
from monkeyjump.tuner.block import GATES, RoutedBlock

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 2, **changes})).eval()


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_key_value_heads=2)).eval()


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3)).eval()


def routed(base_model: nn.Module, seed: int = 1, **config: object) -> PeftModel:
    """A routed model whose adapters do something and whose centers are there."""
    settings = {"center_init": "random", "init_lora_weights": False, "r": 4, "lora_dropout": 0.0, **config}
    base = settings.get("base", "lora")
    if base == "adalora":
        settings.pop("r")  # its ranks are init_r and target_r
    elif base not in ("lora", "lora_fa"):
        settings = {k: v for k, v in settings.items() if k not in ("r", "lora_dropout", "init_lora_weights")}
    torch.manual_seed(seed)
    model = get_peft_model(base_model, MonkeyJumpConfig(**settings))
    if base == "adalora":  # PEFT's noise is so large that hidden states leave the range of float32 routing
        for parameter in trainable(model).values():
            parameter.data *= 0.2
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """`[batch, length]` token ids without padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def position_dependent(tensors: Iterable[Tensor], size: float = 0.1) -> None:
    """Add to every element a value of its own, so that a swap of any two is noticed."""
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            if tensor.is_floating_point():
                places = torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape)
                tensor += (size * torch.sin(1 + 0.7 * places + 1.3 * number)).to(tensor.dtype)


def gates(model: nn.Module, adapter: str = "default", **inputs: object) -> list[Tensor]:
    """What every routed block decides for `inputs`: `[B, T or 1, E]` each, in the order of the blocks."""
    seen: list[Tensor] = []
    blocks = [module for module in model.modules() if isinstance(module, RoutedBlock)]
    hooks = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs[GATES][adapter].detach()), with_kwargs=True
        )
        for block in blocks
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows `[1, T]` of several lengths as one batch with its mask, padding on the left."""
    length = max(row.shape[1] for row in rows)
    pads = [length - row.shape[1] for row in rows]
    ids = torch.cat([nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads)])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (pad, 0)) for row, pad in zip(rows, pads)])
    return {"input_ids": ids, "attention_mask": mask}


def by_message(table: list[tuple]) -> list:
    """Cases of a table as pytest parameters, named by what their error must say first."""
    return [pytest.param(*case, id=case[-1] if isinstance(case[-1], str) else case[-1][0]) for case in table]

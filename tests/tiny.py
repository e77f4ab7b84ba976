"""Tiny random models and batches that the tests share."""

from __future__ import annotations

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
    if settings.get("base", "lora") not in ("lora", "lora_fa", "adalora"):
        settings = {k: v for k, v in settings.items() if k not in ("r", "lora_dropout", "init_lora_weights")}
    torch.manual_seed(seed)
    return get_peft_model(base_model, MonkeyJumpConfig(**settings))


def tokens(batch: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    """`[batch, length]` token ids without padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}

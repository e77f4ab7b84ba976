"""What is known of model families by name: default targets, cross-attention, fused projections, towers.

Nothing here is needed for a model to be routed: all of it can be said in `target_modules`,
`shared_modules` and `register_block`.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

# What a projection is called differs by family; the first row whose names all occur is the default.
DEFAULT_TARGETS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"),  # Llama, Mistral, Qwen, Gemma, ...
    ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),  # Phi-3
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Mixtral (its experts are no modules), ViT, Swin
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP, ...
    ("query", "key", "value", "attention.output.dense"),  # BERT, RoBERTa, ...
    ("query_proj", "key_proj", "value_proj", "attention.output.dense"),  # DeBERTa-v2
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("Wqkv", "Wi", "Wo"),  # ModernBERT
    ("q", "k", "v", "o"),  # T5
    ("c_attn", "c_proj", "c_fc"),  # GPT-2
    ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM
    ("in_proj", "x_proj"),  # Mamba: what its mixer calls as modules and PEFT accepts
)
# the attention output and the gate of the feed-forward part (Table 13)
DEFAULT_SHARED = (
    "o_proj",
    "gate_proj",
    "out_proj",
    "attention.output.dense",
    "o",
    "attn.c_proj",
    "attention.dense",  # GPT-NeoX
    "self_attention.dense",  # Falcon, BLOOM
    "out_lin",
    "attn.Wo",
)

# q, k and v (or gate and up) in one matrix: one slot
FUSED = ("c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv", "gate_up_proj")

CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")
KEYS_AND_VALUES = ("k", "v", "kv", "k_proj", "v_proj", "kv_proj", "key", "value", "c_attn")


def reads_other_tokens(slot: str) -> bool:
    """Whether a slot is a key or value projection of cross-attention: it reads the encoder's tokens.

    The block's gates are for the block's own tokens, so such a slot is shared, whatever was asked for.
    """
    *parents, leaf = slot.split(".")
    return leaf in KEYS_AND_VALUES and any(parent in CROSS_ATTENTION for parent in parents)


def language_tower(model: nn.Module) -> str | None:
    """Path of the language model inside a generating model with vision or audio parts, else None."""
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return None
    if not {"vision_config", "audio_config"} & model.config.sub_configs.keys():
        return None
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder and name), None)


def within(tower: str, targets: tuple[str, ...]) -> str:
    """A regex for modules of these names inside a tower, in PEFT's sense of `target_modules`."""
    return rf"{re.escape(tower)}\..*\.({'|'.join(map(re.escape, targets))})"


def expert_parameters(block: nn.Module) -> list[str]:
    """3-D parameters `[experts, ., .]` of a mixture of experts inside a block, by path within it."""
    return [name for name, weight in block.named_parameters() if weight.dim() == 3 and "experts" in name.split(".")]

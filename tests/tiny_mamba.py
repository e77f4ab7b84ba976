"""Tiny random Mamba models that tests of order, masks and shrinking share; every parameter is position dependent."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from tiny import VOCAB, llama, position_dependent, tokens

SMALL = {"vocab_size": VOCAB, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def mamba(seed: int = 0, **changes: object) -> MambaForCausalLM:
    torch.manual_seed(seed)
    config = {**SMALL, "hidden_size": 16, "state_size": 4, "time_step_rank": 3, **changes}
    return _ready(MambaForCausalLM(MambaConfig(**config)))


def mamba2(seed: int = 0, **changes: object) -> Mamba2ForCausalLM:
    """8 heads of 4 channels in 2 groups."""
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "state_size": 4, "head_dim": 4, "num_heads": 8, "n_groups": 2, "chunk_size": 8}
    return _ready(Mamba2ForCausalLM(Mamba2Config(**{**SMALL, **config, **changes})))


def falcon_mamba(seed: int = 0) -> FalconMambaForCausalLM:
    torch.manual_seed(seed)
    config = {**SMALL, "hidden_size": 16, "state_size": 4, "time_step_rank": 3}
    return _ready(FalconMambaForCausalLM(FalconMambaConfig(**config)))


def jamba(seed: int = 0) -> JambaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    pattern = {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 3}
    return _ready(JambaForCausalLM(JambaConfig(**{**SMALL, **shape, **pattern})))


def plain_llama(seed: int = 0, **changes: object) -> nn.Module:
    return _ready(llama(seed, **changes))


MODELS = {"mamba": mamba, "mamba2": mamba2, "falcon_mamba": falcon_mamba, "jamba": jamba, "llama": plain_llama}


def batches(count: int = 3, length: int = 12, seed: int = 5) -> list[dict[str, torch.Tensor]]:
    """Batches with labels and without padding."""
    rows = [tokens(2, length, seed + number) for number in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def _ready(model: nn.Module) -> nn.Module:
    position_dependent(model.parameters(), size=0.2)  # biases and A differ between channels too
    return model.eval()

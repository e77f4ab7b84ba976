"""The model: a stock `MambaForCausalLM` with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MambaConfig, MambaForCausalLM

from monkeyjump.mamba import patch_mamba
from monkeyjump.mamba.presets import Pretraining


def build_model(settings: Pretraining, tokenizer: Any) -> Any:
    """Weights are drawn from `settings.seed`; the scan is the fastest that this machine has."""
    config = MambaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.n_layers,
        state_size=settings.state_size,
        expand=settings.expand,
        initializer_range=settings.initializer_range,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    model = MambaForCausalLM(config)
    patch_mamba(model)
    return model

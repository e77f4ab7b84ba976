"""Text, tiny pretrained-like Mamba folders and quick settings for `monkeyjump mamba adapt` and `shrink`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from monkeyjump.mamba.pretraining.tokenizer import train_tokenizer

ANIMALS = ("cat", "dog", "hen", "fox", "eel")
SMALL = {
    "context_length": 24, "batch_size": 4, "learning_rate": 0.02, "log_every": 1, "save_every": 4,
    "evaluate_every": 6, "keep": 9, "calibration_batches": 2, "peft_r": 2, "peft_alpha": 4,
    "peft_application_ratio": 0.5, "scan_update_frequency": 3, "target_sparsity": 0.5,
}  # fmt: skip
FAST = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
SHAPE = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {**ATTENTION, "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 4}
MODELS: dict[str, Any] = {
    "mamba": (MambaForCausalLM, MambaConfig, {}),
    # 8 heads of 4 channels in 2 groups
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, {"head_dim": 4, "num_heads": 8, "n_groups": 2, "chunk_size": 8}),
    "falcon_mamba": (FalconMambaForCausalLM, FalconMambaConfig, {}),
    "bamba": (BambaForCausalLM, BambaConfig, {**HEADS, "attn_layer_indices": [1]}),
    "falcon_h1": (FalconH1ForCausalLM, FalconH1Config, {**HEADS, "mamba_d_ssm": 32}),
}


def write_base(folder: Path, kind: str = "mamba", **shape: int) -> Path:
    """`text.txt`, and in `model` a random model with a tokenizer of that text. Returns `folder`."""
    lines = (f"The {ANIMALS[n % 5]} number {n} likes the {ANIMALS[(n + 1) % 5]}.\n" for n in range(200))
    text = "".join(lines)
    (folder / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 300, 24)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model, config, own = MODELS[kind]
    torch.manual_seed(0)
    model(config(**{**SHAPE, **own, **ends, **shape})).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in lines]

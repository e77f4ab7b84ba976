"""Tiny random Mamba models, pure and hybrid, that tests share; every parameter is position dependent."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
    ZambaConfig,
    ZambaForCausalLM,
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


ATTENTION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
HEADS = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 16}
STEPS = {"time_step_min": 0.1, "time_step_max": 1.0, "chunk_size": 8}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, **STEPS}
ZAMBA2 = {"n_mamba_heads": 4, "mamba_ngroups": 2, "mamba_d_state": 4, "adapter_rank": 4, **STEPS}
FALCON_H1 = {"mamba_d_ssm": 32, "ssm_in_multiplier": 1.3, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7]}
BLOCKS = ["linear_attention", "full_attention"]
HYBRIDS = {
    "jamba": (JambaForCausalLM, JambaConfig, {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4}),
    "zamba": (ZambaForCausalLM, ZambaConfig, {"n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 3}),
    "bamba": (BambaForCausalLM, BambaConfig, {**HEADS, "attn_layer_indices": [1]}),
    "zamba2": (Zamba2ForCausalLM, Zamba2Config, ZAMBA2),
    "granitemoehybrid": (GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig, {**HEADS, **EXPERTS}),
    "nemotron_h": (NemotronHForCausalLM, NemotronHConfig, NEMOTRON),
    "falcon_h1": (FalconH1ForCausalLM, FalconH1Config, {**HEADS, **FALCON_H1}),
    "falcon_h1_normed": (FalconH1ForCausalLM, FalconH1Config, {**HEADS, **FALCON_H1, "mamba_rms_norm": True}),
}
SHARED = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_key_value_heads": 2}
LAYERS = {  # where attention comes in
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 3},
    "zamba": {**SHARED, "num_hidden_layers": 3},
    "zamba2": {**SHARED, "num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": BLOCKS},
    "nemotron_h": {"layer_types": BLOCKS},
}


def hybrid(kind: str, size: float = 0.1, **changes: object) -> nn.Module:
    """Mamba layers of the kind beside attention: 32 channels, in a Mamba-2 4 heads of 8 in 2 groups.

    `size` is that of what makes parameters differ: the larger, the more the scans matter for the logits.
    """
    torch.manual_seed(0)
    model, config, own = HYBRIDS[kind]
    return _ready(model(config(**{**SMALL, **ATTENTION, **own, **LAYERS.get(kind, {}), **changes})), size)


def plain_llama(seed: int = 0, **changes: object) -> nn.Module:
    return _ready(llama(seed, **changes))


MODELS = {"mamba": mamba, "mamba2": mamba2, "falcon_mamba": falcon_mamba, "jamba": jamba, "llama": plain_llama}


def batches(count: int = 3, length: int = 12, seed: int = 5) -> list[dict[str, Tensor]]:
    """Batches with labels and without padding."""
    rows = [tokens(2, length, seed + number) for number in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def left_padded_batch() -> dict[str, Tensor]:
    """3 rows of 40 tokens with labels, one of them with padding on its left."""
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, :13] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def outcome(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients by name, of a training step without dropout."""
    model.zero_grad()
    out = model.train()(**batch)
    out.loss.backward()
    model.eval()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """Within `tolerance` of the largest number expected."""
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < tolerance, (name, error)


def assert_same_outcome(found: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    """The two of `outcome`, name by name."""
    assert_near(found[0], expected[0], tolerance, "logits")
    assert found[1].keys() == expected[1].keys()
    for name in found[1]:
        assert_near(found[1][name], expected[1][name], tolerance, name)


def _ready(model: nn.Module, size: float = 0.2) -> nn.Module:
    position_dependent(model.parameters(), size)  # biases and A differ between channels too
    return model.eval()

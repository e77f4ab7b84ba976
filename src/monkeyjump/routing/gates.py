"""From hidden states to gates (Eq. 3 and 4): pure functions, no state, no PEFT.

h [B, T, d], centers [E, d]
  -> logits z [B, T, E]     similarity of every token to every center, over the temperature
  -> gates  m [B, T, E]     softmax, all but the top k set to zero, rescaled by `gate_norm`
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from monkeyjump import native

Similarity = Literal["cosine", "dot", "euclidean", "l1"]
GateNorm = Literal["none", "one", "k"]


def similarity_logits(states: Tensor, centers: Tensor, similarity: Similarity) -> Tensor:
    """Similarity of each state to each center, before the temperature.

    Args:
        states: `[..., d]`, any float dtype; the arithmetic is float32.
        centers: `[E, d]`.
        similarity: `cosine` and `dot` are products; `euclidean` and `l1` are negative distances
            (paper, App. D.1). A zero state has cosine 0 to every center.

    Returns:
        `[..., E]` float32.
    """
    flat, centers = states.reshape(-1, states.shape[-1]).float(), centers.float()
    if similarity == "cosine":
        logits = _cosines(flat, centers)
    elif similarity == "dot":
        logits = flat @ centers.T
    elif similarity == "euclidean":
        # the matmul shortcut loses the small distances, which decide the routing
        logits = -torch.cdist(flat, centers, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        logits = -torch.cdist(flat, centers, p=1.0)
    return logits.view(*states.shape[:-1], centers.shape[0])


def _cosines(states: Tensor, centers: Tensor) -> Tensor:
    """Cosine `[N, E]` of states `[N, d]` and centers `[E, d]`."""
    if native.serves(states, centers) and not centers.requires_grad:
        return native.cosines(states, centers)
    # the product over the norms: no normalized copy of the states is left behind
    norms = torch.linalg.vector_norm(states, dim=-1, keepdim=True).clamp_min(1e-12)
    return states @ F.normalize(centers, dim=-1).T / norms


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """True for the `k` largest of the last dimension; ties go to the lower index.

    `torch.topk` promises no order among equals, so the same token could be routed differently on
    another device or at another shape; a stable sort does promise it.

    Args:
        logits: `[..., E]`.
        k: how many to choose; all where `k >= E`.

    Returns:
        bool `[..., E]`.
    """
    if k >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)


def gates_from_logits(logits: Tensor, k: int, gate_norm: GateNorm) -> tuple[Tensor, Tensor]:
    """Gates of the chosen adapters (Eq. 4) and which were chosen.

    Args:
        logits: `[..., E]` float32, already divided by the temperature.
        k: active adapters per token.
        gate_norm: what the chosen gates sum to. `none`: their softmax mass, as Eq. 4 is written;
            `one`: 1, as the authors' released code; `k`: min(k, E), so that an even split leaves
            `lora_alpha` its meaning in plain LoRA.

    Returns:
        `(m, chosen)`: float32 and bool, both `[..., E]`.
    """
    chosen = top_k_mask(logits, k)
    m = logits.softmax(-1) * chosen
    if gate_norm != "none":
        m = m / m.sum(-1, keepdim=True)
    if gate_norm == "k":
        m = m * min(k, logits.shape[-1])
    return m, chosen

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


def route(
    states: Tensor,
    centers: Tensor,
    experts: int,
    similarity: Similarity,
    temperature: float,
    k: int,
    gate_norm: GateNorm,
    jitter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The routing decision for each state.

    Args:
        states: `[..., d]`, without gradient.
        centers: `[C, d]` float32.
        experts: E; adapter e takes center e mod C.
        similarity: as in `similarity_logits`.
        temperature: tau, by which similarities are divided.
        k, gate_norm: as in `gates_from_logits`.
        jitter: j; logits are multiplied by a factor uniform in [1 - j, 1 + j].

    Returns:
        gates float32 `[..., E]`, chosen bool `[..., E]`, logits float32 `[..., C]`.
    """
    if similarity == "cosine" and not jitter and not centers.requires_grad:
        flat = states.reshape(-1, states.shape[-1]).float()
        if native.serves(flat, centers):
            total = {"none": 0, "one": 1, "k": min(k, experts)}[gate_norm]
            found = native.route(flat, centers, experts, temperature, k, total)
            return tuple(t.view(*states.shape[:-1], t.shape[-1]) for t in found)  # type: ignore[return-value]
    logits = similarity_logits(states, centers, similarity)
    if temperature != 1:
        logits = logits / temperature
    if jitter:
        logits = logits * torch.empty_like(logits).uniform_(1 - jitter, 1 + jitter)
    own = logits
    if centers.shape[0] != experts:
        own = logits[..., torch.arange(experts, device=logits.device) % centers.shape[0]]
    return *gates_from_logits(own, k, gate_norm), logits


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
        # dividing the product by the norms leaves no normalized copy of the states behind
        norms = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).clamp_min(1e-12)
        logits = flat @ F.normalize(centers, dim=-1).T / norms
    elif similarity == "dot":
        logits = flat @ centers.T
    elif similarity == "euclidean":
        # the matmul shortcut loses the small distances, which decide the routing
        logits = -torch.cdist(flat, centers, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        logits = -torch.cdist(flat, centers, p=1.0)
    return logits.view(*states.shape[:-1], centers.shape[0])


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

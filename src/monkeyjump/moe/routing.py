"""The decision of a learned router: softmax over the experts, the k best of them, renormalized."""

from __future__ import annotations

import torch
from torch import Tensor

SCATTER, PLACES = 40_503, 65_536  # Knuth's multiplicative hash of a position


def route(logits: Tensor, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gates, probabilities and choice for router logits.

    Args:
        logits: `[..., N]` float32.
        top_k: experts per token, whose gates are renormalized to sum to 1; None or at least N: all of them.

    Returns:
        gates `[..., N]` (0 where not chosen), probabilities `[..., N]`, chosen bool `[..., N]`. Gates and
        probabilities have a gradient; with `top_k=1` that of the gates is zero, because they are always 1.
    """
    probabilities = logits.softmax(-1)
    if top_k is None or top_k >= logits.shape[-1]:
        return probabilities, probabilities, torch.ones_like(probabilities, dtype=torch.bool)
    best, index = probabilities.topk(top_k, dim=-1)
    gates = torch.zeros_like(probabilities).scatter(-1, index, best / best.sum(-1, keepdim=True))
    chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, index, True)
    return gates, probabilities, chosen


@torch.no_grad()
def sample_per_expert(x: Tensor, chosen: Tensor, attended: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Up to `most` inputs of every expert among the real tokens that were routed to it.

    Which of them is a fixed scatter over positions, and not random: drawing here would shift the random
    numbers of everything after it, which recomputation under gradient checkpointing does not repeat.

    Args:
        x: `[n, d]`.
        chosen: bool `[n, N]`.
        attended: bool `[n]`, or None where every token is real.

    Returns:
        inputs `[N, M, d]` without gradient, and bool `[N, M]`, which of them are there.
    """
    count = x.shape[0]
    scattered = (torch.arange(1, count + 1, device=x.device) * SCATTER % PLACES).float() + 1
    taken = chosen if attended is None else chosen & attended.unsqueeze(-1)
    found, index = (scattered.unsqueeze(-1) * taken).T.topk(min(most, count), dim=-1)  # [N, M]
    return x.detach()[index], found > 0

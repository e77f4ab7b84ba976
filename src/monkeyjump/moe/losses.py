"""Auxiliary losses of learned routers, as functions of what the routers decided in one forward pass.

N experts, tokens t of the real ones (padding never counts):

    f_n = share of all assignments that went to n        P_n = mean over t of the router's p_tn
    load balance   N sum_n f_n P_n         1 where both are uniform; its gradient goes through P alone
    contrast       supervised contrastive loss over normalized expert outputs: two outputs of one
                   expert attract, those of two experts repel
    orthogonality  AdaLoRA's: mean of ||P^T P - I||_F and ||Q Q^T - I||_F over all experts of all layers
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST_NORM = 1e-6  # outputs below it have no direction; with B = 0 at the start all of them are

Group = Literal["projection", "block"]


@dataclass(frozen=True)
class Decision:
    """What one router decided in one forward pass, over its n tokens.

    Attributes:
        block, projection: paths of the block and of the adapted projection.
        probabilities: `[n, N]` float32, in the graph.
        chosen: bool `[n, N]`.
        attended: bool `[n]`, or None where every token is real.
        sampled, there: inputs `[N, M, d_in]` sampled for every expert, and which of them are there; None
            where no loss asks for them.
        outputs: the experts' outputs `[N, M, d_out]` for `sampled`, without dropout.
    """

    block: str
    projection: str
    probabilities: Tensor
    chosen: Tensor
    attended: Tensor | None
    sampled: Tensor | None = None
    there: Tensor | None = None
    outputs: Callable[[Tensor], Tensor] | None = None


def balance(probabilities: Tensor, chosen: Tensor, attended: Tensor | None) -> Tensor:
    """`N sum_n f_n P_n` of one router.

    Args:
        probabilities: `[n, N]`.
        chosen: bool `[n, N]`.
        attended: bool `[n]`, or None where every token is real.
    """
    weight = probabilities.new_ones(len(probabilities), 1) if attended is None else attended.unsqueeze(-1).float()
    assigned = (chosen * weight).sum(0)
    share = assigned / assigned.sum().clamp_min(1)
    mean = (probabilities * weight).sum(0) / weight.sum().clamp_min(1)
    return probabilities.shape[-1] * (share * mean).sum()


def load_balance(decisions: Iterable[Decision], group: Group = "projection") -> list[Tensor]:
    """`balance` of every projection, or of every block with the tokens of its projections concatenated."""
    groups: dict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        groups[decision.projection if group == "projection" else decision.block].append(decision)
    return [balance(*_concatenated(members)) for members in groups.values()]


def _concatenated(decisions: list[Decision]) -> tuple[Tensor, Tensor, Tensor]:
    attended = [d.chosen.new_ones(len(d.chosen)) if d.attended is None else d.attended for d in decisions]
    probabilities = torch.cat([d.probabilities for d in decisions])
    return probabilities, torch.cat([d.chosen for d in decisions]), torch.cat(attended)


def contrast(outputs: Tensor, there: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020) with the expert as the class.

    Args:
        outputs: `[N, M, d]` of the experts; those shorter than 1e-6 are left out.
        there: bool `[N, M]`, which of them count.
        temperature: tau.

    Returns:
        The mean over anchors that have another output of their own expert; 0 where there is none.
    """
    experts, most, _ = outputs.shape
    flat = outputs.flatten(0, 1).float()
    norm = flat.detach().norm(dim=-1)
    valid = there.flatten() & (norm >= SMALLEST_NORM)
    # a short vector must be out of the way before it is normalized: its gradient would not be finite
    safe = torch.where(valid.unsqueeze(-1), flat, torch.ones_like(flat))
    unit = torch.nn.functional.normalize(safe, dim=-1)
    label = torch.arange(experts, device=flat.device).repeat_interleave(most)
    others = valid & ~torch.eye(len(flat), dtype=torch.bool, device=flat.device)  # [anchors, all]: w != a
    positive = others & (label.unsqueeze(1) == label)
    similarity = (unit @ unit.T / temperature).masked_fill(~others, torch.finfo(torch.float32).min)
    log_share = similarity - similarity.logsumexp(-1, keepdim=True)
    count = positive.sum(-1)
    per_anchor = -(log_share.masked_fill(~positive, 0.0)).sum(-1) / count.clamp_min(1)
    anchors = valid & (count > 0)
    return (per_anchor * anchors).sum() / anchors.sum().clamp_min(1)


def expert_contrast(decisions: Iterable[Decision], temperature: float) -> Tensor:
    """`contrast` of every projection's experts, and the mean over projections."""
    values = []
    for decision in decisions:
        assert decision.sampled is not None
        assert decision.there is not None
        assert decision.outputs is not None
        values.append(contrast(decision.outputs(decision.sampled), decision.there, temperature))
    return torch.stack(values).mean()


def orthogonality(matrices: Iterable[Tensor]) -> Tensor:
    """Mean of `||M M^T - I||_F` over matrices whose rows should be orthonormal.

    Args:
        matrices: `[N, r, d]` each: N experts of one layer.
    """
    norms = []
    for matrix in matrices:
        gram = matrix @ matrix.mT
        identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
        norms.append(torch.linalg.matrix_norm(gram - identity))
    return torch.cat(norms).mean()

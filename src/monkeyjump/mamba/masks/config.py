"""`MaskConfig`: what is masked, how masks are sampled, and the budget's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from monkeyjump.suggest import check_choice

KINDS = ("channel", "element")
RELAXATIONS = ("logistic", "hard_concrete")


@dataclass(frozen=True)
class MaskConfig:
    """Settings of learned masks. Raises `ValueError` for a value out of range.

    kind: `channel` gates inner channels (heads, MLP channels), which `shrink` can take away; `element` gates single
        weights, for research: it makes nothing smaller or faster.
    states: also gate the states of the scan.
    relaxation: `logistic` (binary concrete) or `hard_concrete` (exact zeros and ones in training).
    straight_through: 0 or 1 forward, the gradient of the relaxed gate backward.
    masking_tau, final_tau: temperature of the first and of the last step, geometric in between.
    target_sparsity: share of all gates that is to go, over the whole model.
    sparsity_weight: factor of the regularizer `|expected sparsity - target|`.
    ramp_start, ramp_end: shares of training between which the target rises from 0 (cubic, fast at first).
    fix_after: share of training after which the exact choice is made and kept: the rest of it trains the weights on the
        gates that will be exported. 1: only at the end.
    initial_logit, logit_spread: gates start at `initial_logit`, and with scores from Taylor expansion spread around it
        by their rank, `+- logit_spread`.
    block: units are kept in whole runs of so many neighbors.
    mlps: gate MLPs too, where the model has mixers and MLPs.
    """

    kind: str = "channel"
    states: bool = False
    relaxation: str = "logistic"
    straight_through: bool = False
    masking_tau: float = 0.5
    final_tau: float = 0.1
    target_sparsity: float = 0.3
    sparsity_weight: float = 10.0
    ramp_start: float = 0.0
    ramp_end: float = 0.3
    fix_after: float = 0.4
    initial_logit: float = 2.5
    logit_spread: float = 1.5
    block: int = 1
    mlps: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("relaxation", self.relaxation, RELAXATIONS)
        if not 0 <= self.target_sparsity < 1:
            raise ValueError(f"target_sparsity={self.target_sparsity!r} must be at least 0 and below 1")
        if not 0 < self.final_tau <= self.masking_tau:
            raise ValueError(f"final_tau={self.final_tau!r} must be above 0 and at most masking_tau={self.masking_tau}")
        if not 0 <= self.ramp_start < self.ramp_end <= self.fix_after <= 1:
            raise ValueError(
                f"ramp_start={self.ramp_start!r}, ramp_end={self.ramp_end!r}, fix_after={self.fix_after!r} must be "
                f"ascending shares of training"
            )
        if not (self.sparsity_weight >= 0 and math.isfinite(self.sparsity_weight)):
            raise ValueError(f"sparsity_weight={self.sparsity_weight!r} must be 0 or a positive number")
        if self.block < 1:
            raise ValueError(f"block={self.block!r} must be at least 1")
        if self.kind == "element" and (self.states or self.block != 1):
            raise ValueError("kind='element' masks single weights: states and block belong to kind='channel'")

    def temperature(self, progress: float) -> float:
        """Temperature after the share `progress` of training."""
        return self.masking_tau * (self.final_tau / self.masking_tau) ** progress

    def target(self, progress: float) -> float:
        """Sparsity asked for after the share `progress` of training (Zhu & Gupta, 2017, arXiv:1710.01878)."""
        ramp = min(max((progress - self.ramp_start) / (self.ramp_end - self.ramp_start), 0.0), 1.0)
        return self.target_sparsity * (1 - (1 - ramp) ** 3)

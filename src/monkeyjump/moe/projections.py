"""MoELoRA, HydraLoRA and MoLA: published mixtures of LoRA experts with a router on each projection."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Seen, Term
from monkeyjump.moe.config import LowRankExpertConfig, setting
from monkeyjump.moe.losses import expert_contrast, load_balance


@dataclass
class MoELoRAConfig(LowRankExpertConfig):
    """MoELoRA (Luo et al., 2024, arXiv:2402.12851), in our reading of it.

    Top-k of N LoRA experts by a router on each projection, a load-balance loss, and a contrastive loss
    over the experts' outputs. The placement is the only one that gives the published parameter count;
    the losses' weights, temperature and sampling are ours: the original's could not be checked. The
    contrastive loss trains the experts and sends no gradient into their inputs.
    """

    balance_weight: float = setting(0.01, "Weight of the load-balance loss.")
    contrastive_weight: float = setting(0.01, "Weight of the contrastive loss.")
    contrastive_temperature: float = setting(0.1, "tau of the contrastive loss.")
    contrastive_tokens: int = setting(32, "Tokens per expert and projection that the contrastive loss compares.")

    peft_name: ClassVar[str] = "MOELORA"

    def check(self) -> None:
        super().check()
        check_number("contrastive_weight", self.contrastive_weight, "of at least 0", lambda v: v >= 0)
        check_number("contrastive_temperature", self.contrastive_temperature, "above 0", lambda v: v > 0)
        check_integer("contrastive_tokens", self.contrastive_tokens, least=2)

    @property
    def samples(self) -> int:
        """Inputs per expert that a projection notes for the losses."""
        return self.contrastive_tokens if self.contrastive_weight else 0

    def terms(self) -> list[Term]:
        contrastive = functools.partial(_contrast, temperature=self.contrastive_temperature)
        return [*super().terms(), Term("contrastive", self.contrastive_weight, contrastive)]


@dataclass
class HydraLoRAConfig(LowRankExpertConfig):
    """HydraLoRA (Tian et al., 2024, arXiv:2404.19245): one A, N heads B_n, a dense softmax router on each projection.

    The original mixes all heads; `top_k=2` gives the sparse variant that Monkey Jump's paper speaks of.
    """

    top_k: int | None = setting(None, "None: all heads, by softmax. Else the k best, their gates summing to 1.")

    peft_name: ClassVar[str] = "HYDRALORA"
    shares_a: ClassVar[bool] = True


@dataclass
class MoLAConfig(LowRankExpertConfig):
    """MoLA (Gao et al., 2024, arXiv:2402.08562): more experts in the upper layers, a router on each projection.

    `num_experts` gives the experts of equal groups of layers from bottom to top, "2468" or [2, 4, 6, 8];
    "1357" has the budget of 4 everywhere. With fewer than `top_k` experts a layer takes all of them.
    """

    num_experts: str | list[int] | int = setting("2468", "Experts per group of layers, bottom to top.")
    balance_weight: float = setting(0.001, "Weight of the load-balance loss, a sum over layers.")

    peft_name: ClassVar[str] = "MOLA"

    def expert_counts(self) -> list[int]:
        given = self.num_experts
        if isinstance(given, str):
            if not given.isdigit():
                raise ValueError(f"num_experts={given!r} is out of range: use one digit per group, such as '2468'")
            return [int(digit) for digit in given]
        if isinstance(given, (list, tuple)) and given:
            return list(given)
        return [given]  # type: ignore[list-item]

    def terms(self) -> list[Term]:
        return [Term("load_balance", self.balance_weight, _balance_of_layers)]


def _contrast(seen: Seen, temperature: float) -> Any:
    seen.check_whole("contrastive", "contrastive_weight")
    return expert_contrast(seen.notes, temperature)


def _balance_of_layers(seen: Seen) -> Any:
    """Sum over the layers, each with the decisions of all its projections (MoLA)."""
    return sum(load_balance(seen.notes, "block"))

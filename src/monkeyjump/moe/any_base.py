"""`MoEConfig`: the generic mixture, whose experts are LoRA, LoRA-FA, AdaLoRA or Propulsion adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Term
from monkeyjump.moe.config import ExpertConfig, LowRankExpertConfig, setting
from monkeyjump.moe.ranks import expert_orthogonality
from monkeyjump.suggest import check_choice, check_fields


@dataclass
class MoEConfig(ExpertConfig):
    """A mixture of any of four adapters, without auxiliary losses unless asked for: `MoEConfig(base="lora", ...)`.

    `base` is "lora", "lora_fa", "adalora" or "propulsion"; what returns is an instance of the class for it,
    with the base method's own fields.
    """

    base: str = setting("lora", "What the experts are: lora, lora_fa, adalora or propulsion.")

    bases: ClassVar[dict[str, type[MoEConfig]]] = {}

    def __init_subclass__(cls, base: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        MoEConfig.bases[base] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> ExpertConfig:
        if cls is MoEConfig:
            base = kwargs.get("base", "lora")
            check_choice("base", base, MoEConfig.bases)
            cls = MoEConfig.bases[base]
            check_fields(cls, kwargs, f"MoEConfig(base={base!r})")
        return super().__new__(cls, *args, **kwargs)

    def check(self) -> None:
        super().check()
        if MoEConfig.bases[self.base] is not type(self):
            raise ValueError(f"base={self.base!r} does not fit {type(self).__name__}; use MoEConfig(base=...)")


@dataclass
class LoraMixtureConfig(MoEConfig, LowRankExpertConfig, base="lora"):
    """`MoEConfig(base="lora")`: the generic mixture of LoRA experts (Monkey Jump's paper, Eq. 2)."""

    base: str = setting("lora", "What the experts are.")

    peft_name: ClassVar[str] = "MOE_LORA"


@dataclass
class LoraFAMixtureConfig(MoEConfig, LowRankExpertConfig, base="lora_fa"):
    """`MoEConfig(base="lora_fa")`: LoRA experts whose A stay frozen, each at a random start of its own."""

    base: str = setting("lora_fa", "What the experts are.")

    peft_name: ClassVar[str] = "MOE_LORA_FA"
    trains_a: ClassVar[bool] = False


@dataclass
class AdaLoraMixtureConfig(MoEConfig, LowRankExpertConfig, base="adalora"):
    """`MoEConfig(base="adalora")`: `y = W x + c sum_n g_n P_n diag(lambda_n) Q_n x`, ranks allotted over all experts.

    The fields are those of PEFT's `AdaLoraConfig`; `RankUpdate` drives the rank schedule.
    """

    base: str = setting("adalora", "What the experts are.")
    r: int = setting(8, "Not used: ranks are init_r and target_r.")
    init_r: int = setting(12, "Rank that each expert starts with.")
    target_r: int = setting(8, "Mean rank of an expert at the end; equal to init_r: no ranks are pruned.")
    tinit: int = setting(0, "Steps before the first pruning.")
    tfinal: int = setting(0, "Steps at the end with the ranks left as they are.")
    deltaT: int = setting(1, "Steps from one pruning to the next.")
    beta1: float = setting(0.85, "Of the moving average of the sensitivity.")
    beta2: float = setting(0.85, "Of the moving average of its uncertainty.")
    orth_reg_weight: float = setting(0.5, "Weight of the orthogonality loss.")
    total_step: int | None = setting(None, "Optimizer steps of the whole run; required.")
    kept_ranks: dict[str, list[bool]] | None = setting(None, "What the latest pruning left; written in training.")

    peft_name: ClassVar[str] = "MOE_ADALORA"

    def check(self) -> None:
        super().check()
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            check_integer(name, getattr(self, name), least)
        check_integer("total_step", self.total_step, least=1)
        assert self.total_step is not None
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), "between 0 and 1", lambda v: 0 < v < 1)
        check_number("orth_reg_weight", self.orth_reg_weight, "of at least 0", lambda v: v >= 0)
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is out of range: use at most init_r={self.init_r}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} is out of range: pruning must begin before total_step - tfinal = "
                f"{self.total_step - self.tfinal}"
            )

    @property
    def rank(self) -> int:
        return self.init_r

    @property
    def scale(self) -> float:
        return self.lora_alpha / (self.init_r + 1e-5)  # as PEFT's

    def terms(self) -> list[Term]:
        return [*super().terms(), Term("orthogonality", self.orth_reg_weight, expert_orthogonality, reads=False)]


@dataclass
class PropulsionMixtureConfig(MoEConfig, base="propulsion"):
    """`MoEConfig(base="propulsion")`: `y = (W x + b) * (1 + sum_n g_n (z_n^degree - 1))`, z_n `[d_out]`.

    All experts start within a thousandth of 1: at exactly 1 they would get the same gradients and stay
    alike but for the routing.
    """

    base: str = setting("propulsion", "What the experts are.")
    degree: int = setting(15, "Power to which z is raised.")

    peft_name: ClassVar[str] = "MOE_PROPULSION"

    def check(self) -> None:
        super().check()
        check_integer("degree", self.degree, least=1)

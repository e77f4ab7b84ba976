"""Configs of the mixtures: one dataclass per method, with its fields and the auxiliary losses that it adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Seen, Term
from monkeyjump.moe.losses import expert_contrast, load_balance
from monkeyjump.moe.ranks import expert_orthogonality
from monkeyjump.suggest import check_choice, check_fields
from monkeyjump.tuner.folder import check_weights, note_import


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ExpertConfig(PeftConfig):
    """What every mixture has: N experts and a softmax router `[N, d_in]` (float32) on each adapted projection.

    Raises:
        TypeError: an unknown field; the message lists the near misses.
        ValueError: a value outside its range; the message names field, value and remedy.
    """

    num_experts: Any = _field(4, "N, experts of each adapted projection.")
    top_k: int | None = _field(2, "Experts that act on a token, their gates summing to 1. None: all, by softmax.")
    balance_weight: float = _field(0.0, "Weight of the load-balance loss.")
    target_modules: list[str] | str | None = _field(None, "Modules to adapt.")
    exclude_modules: list[str] | str | None = _field(None, "Modules not to adapt.")
    init_weights: bool = _field(True, "False: experts that do something from the start, for tests.")
    modules_to_save: list[str] | None = _field(None, "Modules trained in full.")
    layers_to_transform: list[int] | int | None = _field(None, "Layers to adapt.")
    layers_pattern: list[str] | str | None = _field(None, "Name of the layer list.")
    target_parameters: list[str] | None = _field(None, "Not supported; keep None.")
    bias: str = _field("none", "Biases to train: none, all or mixture_only.")

    peft_name: ClassVar[str]  # the method's PEFT type

    def __new__(cls, *args: Any, **kwargs: Any) -> ExpertConfig:
        check_fields(cls, kwargs, cls.__name__)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.peft_name]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self.check()

    def check(self) -> None:
        """Raise `ValueError` where a field is out of range."""
        for count in self.expert_counts():
            check_integer("num_experts", count, least=1)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, least=1)
            if self.top_k > (most := max(self.expert_counts())):
                raise ValueError(
                    f"top_k={self.top_k} is out of range: there are only num_experts={most} experts; use at most "
                    f"{most}, or None for all of them"
                )
        check_number("balance_weight", self.balance_weight, "of at least 0", lambda v: v >= 0)
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} is out of range: these experts adapt modules; use "
                "target_modules"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is set, but layers_to_transform is None; set both")

    # ------------------------------------------------------------------ what the method is

    def expert_counts(self) -> list[int]:
        """Numbers of experts from the bottom to the top of the model, one for each of as many groups of layers."""
        return [self.num_experts]

    def experts_at(self, layer: int, layers: int) -> int:
        """Experts of a projection in block `layer` of `layers`."""
        counts = self.expert_counts()
        return counts[len(counts) * layer // layers]

    def terms(self) -> list[Term]:
        """The method's auxiliary losses."""
        return [Term("load_balance", self.balance_weight, _mean_balance)]

    # ------------------------------------------------------------------ files

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and into the adapter's README the import that loading needs."""
        super().save_pretrained(save_directory, **kwargs)
        note_import(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """As PEFT's, after checking that a local adapter's weights are whole."""
        check_weights(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


@dataclass
class LowRankExpertConfig(ExpertConfig):
    """Experts that are low-rank updates: `y = W x + s sum_n g_n B_n A_n drop(x)`, s = alpha / r."""

    r: int = _field(8, "Rank of each expert.")
    lora_alpha: float = _field(16, "alpha: updates are multiplied by alpha / r.")
    lora_dropout: float = _field(0.05, "Dropout on the experts' input.")

    shares_a: ClassVar[bool] = False  # one A for all experts
    trains_a: ClassVar[bool] = True

    def check(self) -> None:
        super().check()
        check_integer("r", self.rank, least=1)
        check_number("lora_alpha", self.lora_alpha, "above 0", lambda v: v > 0)
        check_number("lora_dropout", self.lora_dropout, "in [0, 1)", lambda v: 0 <= v < 1)

    @property
    def rank(self) -> int:
        """Rank that an expert starts with."""
        return self.r

    @property
    def scale(self) -> float:
        """What an expert's product is multiplied by."""
        return self.lora_alpha / self.rank


@dataclass
class MoELoRAConfig(LowRankExpertConfig):
    """MoELoRA (Luo et al., 2024, arXiv:2402.12851), in our reading of it.

    Top-k of N LoRA experts by a router on each projection, a load-balance loss, and a contrastive loss
    over the experts' outputs. The placement is the only one that gives the published parameter count;
    the losses' weights, temperature and sampling are ours: the original's could not be checked. The
    contrastive loss trains the experts and sends no gradient into their inputs.
    """

    balance_weight: float = _field(0.01, "Weight of the load-balance loss.")
    contrastive_weight: float = _field(0.01, "Weight of the contrastive loss.")
    contrastive_temperature: float = _field(0.1, "tau of the contrastive loss.")
    contrastive_tokens: int = _field(32, "Tokens per expert and projection that the contrastive loss compares.")

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

    top_k: int | None = _field(None, "None: all heads, by softmax. Else the k best, their gates summing to 1.")

    peft_name: ClassVar[str] = "HYDRALORA"
    shares_a: ClassVar[bool] = True


@dataclass
class MoLAConfig(LowRankExpertConfig):
    """MoLA (Gao et al., 2024, arXiv:2402.08562): more experts in the upper layers, a router on each projection.

    `num_experts` gives the experts of equal groups of layers from bottom to top, "2468" or [2, 4, 6, 8];
    "1357" has the budget of 4 everywhere. With fewer than `top_k` experts a layer takes all of them.
    """

    num_experts: str | list[int] | int = _field("2468", "Experts per group of layers, bottom to top.")
    balance_weight: float = _field(0.001, "Weight of the load-balance loss, a sum over layers.")

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


@dataclass
class MoEConfig(ExpertConfig):
    """A mixture of any of four adapters, without auxiliary losses unless asked for: `MoEConfig(base="lora", ...)`.

    `base` is "lora", "lora_fa", "adalora" or "propulsion"; what returns is an instance of the class for it,
    with the base method's own fields.
    """

    base: str = _field("lora", "What the experts are: lora, lora_fa, adalora or propulsion.")

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

    base: str = _field("lora", "What the experts are.")

    peft_name: ClassVar[str] = "MOE_LORA"


@dataclass
class LoraFAMixtureConfig(MoEConfig, LowRankExpertConfig, base="lora_fa"):
    """`MoEConfig(base="lora_fa")`: LoRA experts whose A stay frozen, each at a random start of its own."""

    base: str = _field("lora_fa", "What the experts are.")

    peft_name: ClassVar[str] = "MOE_LORA_FA"
    trains_a: ClassVar[bool] = False


@dataclass
class AdaLoraMixtureConfig(MoEConfig, LowRankExpertConfig, base="adalora"):
    """`MoEConfig(base="adalora")`: `y = W x + c sum_n g_n P_n diag(lambda_n) Q_n x`, ranks allotted over all experts.

    The fields are those of PEFT's `AdaLoraConfig`; `RankUpdate` drives the rank schedule.
    """

    base: str = _field("adalora", "What the experts are.")
    r: int = _field(8, "Not used: ranks are init_r and target_r.")
    init_r: int = _field(12, "Rank that each expert starts with.")
    target_r: int = _field(8, "Mean rank of an expert at the end; equal to init_r: no ranks are pruned.")
    tinit: int = _field(0, "Steps before the first pruning.")
    tfinal: int = _field(0, "Steps at the end with the ranks left as they are.")
    deltaT: int = _field(1, "Steps from one pruning to the next.")
    beta1: float = _field(0.85, "Of the moving average of the sensitivity.")
    beta2: float = _field(0.85, "Of the moving average of its uncertainty.")
    orth_reg_weight: float = _field(0.5, "Weight of the orthogonality loss.")
    total_step: int | None = _field(None, "Optimizer steps of the whole run; required.")
    kept_ranks: dict[str, list[bool]] | None = _field(None, "What the latest pruning left; written in training.")

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

    base: str = _field("propulsion", "What the experts are.")
    degree: int = _field(15, "Power to which z is raised.")

    peft_name: ClassVar[str] = "MOE_PROPULSION"

    def check(self) -> None:
        super().check()
        check_integer("degree", self.degree, least=1)


def _contrast(seen: Seen, temperature: float) -> Any:
    return expert_contrast(seen.notes, temperature)


def _mean_balance(seen: Seen) -> Any:
    """Mean over the routers."""
    values = load_balance(seen.notes)
    return sum(values) / len(values)


def _balance_of_layers(seen: Seen) -> Any:
    """Sum over the layers, each with the decisions of all its projections (MoLA)."""
    return sum(load_balance(seen.notes, "block"))

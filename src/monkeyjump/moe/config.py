"""What the configs of all mixtures share: fields, checks, files.

One dataclass per method, each beside its family: projections.py, any_base.py, mixlora.py, more.py, moa.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import PeftType

from monkeyjump.config import check_integer, check_number
from monkeyjump.moe.auxiliary import Seen, Term
from monkeyjump.moe.losses import load_balance
from monkeyjump.suggest import check_fields
from monkeyjump.tuner.folder import check_weights, note_import


def setting(default: Any, help: str) -> Any:
    """A field of a config, with the help that command lines show."""
    return field(default=default, metadata={"help": help})


@dataclass
class ExpertConfig(PeftConfig):
    """What every mixture has: N experts and a softmax router `[N, d_in]` (float32) on each adapted projection.

    Raises:
        TypeError: an unknown field; the message lists the near misses.
        ValueError: a value outside its range; the message names field, value and remedy.
    """

    num_experts: Any = setting(4, "N, experts of each adapted projection.")
    top_k: int | None = setting(2, "Experts that act on a token, their gates summing to 1. None: all, by softmax.")
    balance_weight: float = setting(0.0, "Weight of the load-balance loss.")
    target_modules: list[str] | str | None = setting(None, "Modules to adapt.")
    exclude_modules: list[str] | str | None = setting(None, "Modules not to adapt.")
    init_weights: bool = setting(True, "False: experts that do something from the start, for tests.")
    modules_to_save: list[str] | None = setting(None, "Modules trained in full.")
    layers_to_transform: list[int] | int | None = setting(None, "Layers to adapt.")
    layers_pattern: list[str] | str | None = setting(None, "Name of the layer list.")
    target_parameters: list[str] | None = setting(None, "Not supported; keep None.")
    bias: str = setting("none", "Biases to train: none, all or mixture_only.")

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

    r: int = setting(8, "Rank of each expert.")
    lora_alpha: float = setting(16, "alpha: updates are multiplied by alpha / r.")
    lora_dropout: float = setting(0.05, "Dropout on the experts' input.")

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


def refuse_unread(config: ExpertConfig, why: str) -> None:
    """Refuse what a method inherits from `ExpertConfig` and never reads.

    Raises:
        ValueError: naming the field, its value and why.
    """
    for name in ("num_experts", "top_k", "balance_weight"):
        if value := getattr(config, name):
            raise ValueError(f"{name}={value!r} is set, but {why}")


def _mean_balance(seen: Seen) -> Any:
    """Mean over the routers."""
    values = load_balance(seen.notes)
    return sum(values) / len(values)

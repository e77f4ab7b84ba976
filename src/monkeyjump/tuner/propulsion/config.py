"""Config of Propulsion."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType


@dataclass
class PropulsionConfig(PeftConfig):
    """`y = (W x + b) * z^degree`, elementwise over the outputs; z `[d_out]` is all that is trained."""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    degree: int = field(default=15, metadata={"help": "Power to which z is raised."})
    init_weights: bool = field(default=True, metadata={"help": "z = 1 at the start; False: noise, for tests."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported; keep None."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or propulsion_only."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["PROPULSION"]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree={self.degree!r} is out of range: use an integer of at least 1")
        if self.target_parameters:
            raise ValueError(
                f"target_parameters={self.target_parameters!r} is out of range: Propulsion adapts the outputs of "
                "modules; use target_modules"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is set, but layers_to_transform is None; set both")

"""Config of LoRA-FA."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig
from peft.utils import PeftType


@dataclass
class LoraFAConfig(LoraConfig):
    """As `LoraConfig`; A is saved with the adapter but never trained.

    The point of LoRA-FA is memory: without a gradient for A the backward pass needs `A x`
    `[B, T, r]` and not `x` `[B, T, d_in]`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["LORA_FA"]
        if self.use_dora:
            raise ValueError("use_dora=True: LoRA-FA has no DoRA form; use base='lora' for DoRA")

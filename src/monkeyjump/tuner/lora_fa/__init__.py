"""LoRA-FA (Zhang et al., 2023): LoRA with A frozen at its random start."""

from monkeyjump.tuner.lora_fa.config import LoraFAConfig
from monkeyjump.tuner.lora_fa.model import LoraFAModel

__all__ = ["LoraFAConfig", "LoraFAModel"]

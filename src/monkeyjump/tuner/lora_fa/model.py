"""LoRA-FA as a PEFT tuner: LoRA's own layers with A declared frozen."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from monkeyjump.tuner.fused import fuse


class LoraFAModel(LoraModel):
    """`LoraModel` in which only B is trained."""

    def _create_and_replace(self, lora_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super()._create_and_replace(lora_config, adapter_name, *args, **kwargs)
        target_name, parent = args[1], args[2]
        layer = getattr(parent, target_name)
        _freeze_a(layer, adapter_name)
        fuse(layer)  # PEFT's own layer keeps its input for the dropout, which LoRA-FA is there to avoid


def _freeze_a(layer: nn.Module, adapter: str) -> None:
    assert isinstance(layer, LoraLayer)
    # PEFT keeps what is declared here frozen whenever it switches adapters on
    frozen = ("lora_A", "lora_embedding_A")
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: frozen}
    layer._freeze_non_trainable_peft_weights(adapter)

"""Propulsion as a PEFT tuner."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from monkeyjump.tuner.propulsion.layer import PropulsionLayer


class PropulsionModel(BaseTuner):
    """Wraps every targeted linear layer in a `PropulsionLayer`."""

    prefix = "propulsion_"
    tuner_layer_cls = PropulsionLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PropulsionLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if not isinstance(target, (nn.Linear, Conv1D)):
            raise ValueError(
                f"target_modules matches {current_key!r}, a {type(target).__name__}; Propulsion adapts nn.Linear "
                "and Conv1D"
            )
        layer = PropulsionLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

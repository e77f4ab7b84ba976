"""Mixture-of-experts behaviour from the PEFT adapters a model already has.

from peft import get_peft_model
from monkeyjump import CenterUpdate, MonkeyJumpConfig, initialize_centers

model = get_peft_model(base_model, MonkeyJumpConfig(base="lora", r=8))
initialize_centers(model, train_loader)
Trainer(model, args, train_dataset=data, callbacks=[CenterUpdate()]).train()
"""

from importlib.metadata import version as _version

# isort: off
import monkeyjump.loggers  # before PEFT is imported

# isort: on
import monkeyjump.moe  # noqa: F401  registers the mixtures with PEFT
from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.presets import PRESETS
from monkeyjump.tuner import LoraFAConfig, PropulsionConfig
from monkeyjump.tuner.blocks import register_block
from monkeyjump.tuner.callback import CenterUpdate
from monkeyjump.tuner.initialize import initialize_centers
from monkeyjump.tuner.inspect import describe_routing, record_routing
from monkeyjump.tuner.model import routing_inputs
from monkeyjump.tuner.registry import extend_peft_type, register_routed_methods

__version__ = _version("monkeyjump")

__all__ = [
    "PRESETS",
    "CenterUpdate",
    "LoraFAConfig",
    "MonkeyJumpConfig",
    "PropulsionConfig",
    "describe_routing",
    "extend_peft_type",
    "initialize_centers",
    "record_routing",
    "register_block",
    "register_routed_methods",
    "routing_inputs",
]

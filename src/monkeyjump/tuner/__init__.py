"""How routing enters PEFT. Importing this registers every routed method, and two plain ones of ours."""

from peft.utils import register_peft_method

from monkeyjump.tuner.registry import extend_peft_type, register_routed_methods

extend_peft_type("LORA_FA")
extend_peft_type("PROPULSION")

from monkeyjump.tuner.lora_fa import LoraFAConfig, LoraFAModel  # noqa: E402  the configs name the new types
from monkeyjump.tuner.propulsion import PropulsionConfig, PropulsionModel  # noqa: E402
from monkeyjump.tuner.wrappers import extend_wrappers  # noqa: E402

register_peft_method(name="lora_fa", config_cls=LoraFAConfig, model_cls=LoraFAModel, prefix="lora_")
register_peft_method(name="propulsion", config_cls=PropulsionConfig, model_cls=PropulsionModel)
register_routed_methods()
extend_wrappers()

__all__ = ["LoraFAConfig", "LoraFAModel", "PropulsionConfig", "PropulsionModel"]

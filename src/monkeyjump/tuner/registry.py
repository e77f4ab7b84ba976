"""How routed methods enter PEFT: one PEFT type, config class and tuner class for each base method.

`PeftType` is a closed enum without plugins, so a member is added for every routed method (`MJ_LORA`
for `LORA`, ...) before `register_peft_method` is called. All of it happens when monkeyjump is
imported; `PeftModel.from_pretrained` then loads routed adapters like any other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.suggest import did_you_mean
from monkeyjump.tuner.adalora import RoutedAdaLora
from monkeyjump.tuner.methods import KEEPS_BASE, NOT_ROUTABLE
from monkeyjump.tuner.model import RoutedTuner
from monkeyjump.tuner.router import Router

PREFIX = "MJ_"
_config_classes: dict[str, type[MonkeyJumpConfig]] = {}  # by the base method's name, lower case


def extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum of methods, or return the one that is there.

    `peft.utils.register_peft_method` takes only names that are in it, and PEFT has no other way to add one.

    Args:
        name: in upper case, as in `PeftType`.
    """
    if name in PeftType._member_map_:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    setattr(PeftType, name, member)  # before the maps, where the enum would refuse a reassignment
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


def config_class(base: str) -> type[MonkeyJumpConfig]:
    """The config class that routes a base method.

    Raises:
        ValueError: there is no such method, or it cannot be routed; the message says why.
    """
    key = str(base).lower()
    if key in _config_classes:
        return _config_classes[key]
    if key.upper() in NOT_ROUTABLE:
        raise ValueError(
            f"base={base!r} cannot be routed: {NOT_ROUTABLE[key.upper()]}; choose one of {', '.join(routable())}"
        )
    raise ValueError(
        f"base={base!r} is not known: {did_you_mean(key, _config_classes)}choose one of {', '.join(routable())}"
    )


def routable() -> list[str]:
    """Names of the base methods that can be routed."""
    return sorted(_config_classes)


def register_routed_methods() -> None:
    """Make a routed twin, `MJ_<name>`, of every registered PEFT method that can have one and has none yet.

    Importing monkeyjump calls it. Call it again after `register_peft_method` has added a method of your
    own: `MonkeyJumpConfig(base=<name>)` then takes it (docs/own-methods.md).
    """
    for peft_type in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        name = str(peft_type.value)
        if name.startswith(PREFIX) or name in NOT_ROUTABLE or name.lower() in _config_classes:
            continue
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
        if isinstance(tuner, type) and issubclass(tuner, BaseTuner):
            _register(peft_type, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], tuner)


def _register(base_type: PeftType, base_config: type[PeftConfig], base_tuner: type[BaseTuner]) -> None:
    routed_type = extend_peft_type(PREFIX + base_type.value)
    config = _make_config(routed_type, base_type, base_config)
    tuner = _make_tuner(base_tuner)
    for made in (config, tuner):
        globals()[made.__name__] = made  # pickle looks classes up by module and name
    register_peft_method(
        name=routed_type.value.lower(),
        config_cls=config,
        model_cls=tuner,
        prefix=PEFT_TYPE_TO_PREFIX_MAPPING[base_type],
    )
    _config_classes[base_type.value.lower()] = config


def _make_config(routed_type: PeftType, base_type: PeftType, base_config: type[PeftConfig]) -> type[MonkeyJumpConfig]:
    own = {f.name: f for f in dataclasses.fields(base_config)}
    lora_like = issubclass(base_config, LoraConfig)  # elsewhere r means something else
    defaults = [
        (name, own[name].type, dataclasses.field(default=value, metadata=own[name].metadata))
        for name, value in (MonkeyJumpConfig.default_of_lora if lora_like else {}).items()
    ]
    base_name = base_type.value.lower()

    def __post_init__(self: Any) -> None:
        if self.base.lower() != base_name:
            raise ValueError(f"base={self.base!r} does not fit {type(self).__name__}; use MonkeyJumpConfig(base=...)")
        MonkeyJumpConfig.__post_init__(self)
        start = getattr(self, "init_lora_weights", True)
        if start not in KEEPS_BASE:
            raise ValueError(
                f"init_lora_weights={start!r} moves part of the base weights into the adapter, which a gate would "
                f"then switch off; use one of {KEEPS_BASE}"
            )
        self.peft_type = routed_type

    defaults.append(("base", str, dataclasses.field(default=base_name)))
    return dataclasses.make_dataclass(
        f"MonkeyJump{base_config.__name__}",
        defaults,
        bases=(MonkeyJumpConfig, base_config),
        namespace={"__post_init__": __post_init__, "__module__": __name__},
    )


def _make_tuner(base_tuner: type[BaseTuner]) -> type[BaseTuner]:
    layers = base_tuner.tuner_layer_cls
    layers = layers if isinstance(layers, tuple) else (layers,)
    adalora = issubclass(base_tuner, AdaLoraModel)  # it inherits LoRA's hooks, but its layers know no adapter_names
    mixin = RoutedAdaLora if adalora else RoutedTuner
    namespace = {
        "__module__": __name__,
        "__doc__": f"{base_tuner.__name__} with routed adapters.",
        "tuner_layer_cls": (*layers, Router),  # PEFT only uses it in isinstance
        "takes_mixed_batches": hasattr(base_tuner, "_enable_peft_forward_hooks") and not adalora,
    }
    return type(f"MonkeyJump{base_tuner.__name__}", (mixin, base_tuner), namespace)

"""Every method in PEFT's registry is either routed or refused with a reason; none is forgotten."""

from __future__ import annotations

import re

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft_methods import plain_class, routed_config

from monkeyjump import MonkeyJumpConfig
from monkeyjump.tuner.methods import ADDS_IN_PLACE, NOT_ROUTABLE
from monkeyjump.tuner.registry import PREFIX, routable

PLAIN = sorted(str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING if not str(t.value).startswith(PREFIX))


@pytest.mark.parametrize("name", PLAIN)
def test_method_is_either_routed_or_refused(name: str) -> None:
    assert (name.lower() in routable()) != (name in NOT_ROUTABLE)


@pytest.mark.parametrize("name", sorted(NOT_ROUTABLE))
def test_refused_method_says_why(name: str) -> None:
    base, reason = name.lower(), re.escape(NOT_ROUTABLE[name])
    with pytest.raises(ValueError, match=f"base='{base}' cannot be routed: {reason}; choose one of .*lora"):
        MonkeyJumpConfig(base=base)


def test_nothing_is_refused_that_peft_does_not_have() -> None:
    assert set(PLAIN) >= NOT_ROUTABLE.keys()
    assert set(PLAIN) >= ADDS_IN_PLACE


@pytest.mark.parametrize("base", routable())
def test_routed_config_is_also_the_methods_own(base: str) -> None:
    config = routed_config(base)
    assert isinstance(config, plain_class(base))
    assert isinstance(config, MonkeyJumpConfig)
    assert config.peft_type == PeftType[PREFIX + base.upper()]
    assert (
        PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].prefix == PEFT_TYPE_TO_TUNER_MAPPING[PeftType[base.upper()]].prefix
    )

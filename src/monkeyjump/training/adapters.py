"""From the `method` section to PEFT: which fields it takes, and the adapter's config that it makes.

The routed method, the plain one of the same name and the mixtures of it take the same fields from the same
preset, so that two runs that differ in the method alone differ in nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from torch import nn

from monkeyjump.config import MonkeyJumpConfig
from monkeyjump.methods import METHODS
from monkeyjump.moe import ExpertConfig
from monkeyjump.presets import PRESETS
from monkeyjump.suggest import check_choice, did_you_mean
from monkeyjump.tasks.errors import InputError
from monkeyjump.tuner.registry import config_class, routable
from monkeyjump.tuner.targets import default_targets

if TYPE_CHECKING:
    from monkeyjump.training.config import Method

# set by PEFT or by us, never by a person
INTERNAL = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "base_fingerprint",
            "peft_version", "runtime_config", "task_type", "base", "task_names"}  # fmt: skip
OF_ROUTING = {"top_k"}  # of a preset: they are Monkey Jump's, though mixtures have a field of the same name
UNKNOWN_STEPS = 1_000_000  # stands for the number of a run's steps where a config is made only to be checked


def routed_unless_told(base: str) -> bool:
    """What `routed` is where it is not given: false for methods with a router of their own."""
    return not _is_mixture(base)


def fields_of_comparison() -> set[str]:
    """Fields that some of the methods of the table have and others not, such as `top_k` and `num_experts`."""
    return set().union(*(row.fields() for row in METHODS.values())) - INTERNAL


def adapter_fields(base: str, routed: bool) -> dict[str, tuple[Any, str]]:
    """Field -> (default, help) of the adapter's own config.

    Raises:
        ValueError: there is no such method, or it cannot be routed.
    """
    found = {}
    for field in dataclasses.fields(_class_of(base, routed)):
        if field.name not in INTERNAL:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            found[field.name] = (default, " ".join(str(field.metadata.get("help", "")).split()))
    return found


def check_method(base: str, routed: bool, preset: str, options: dict[str, Any]) -> None:
    """Builds the adapter's config once, so that a wrong value is refused before anything is loaded.

    Raises:
        ValueError: naming field, value and remedy; all unknown fields at once.
    """
    check_choice("preset", preset, PRESETS)
    known = adapter_fields(base, routed)
    own = ("base", "routed", "preset", "centers")
    unknown = [f"'{n}' is no field of {base}: {did_you_mean(n, [*known, *own])}" for n in options if n not in known]
    if unknown:
        raise ValueError("; ".join(unknown).rstrip() + f"(it takes {', '.join(sorted(known))})")
    _build(base, routed, preset, options)


def adapter_config(
    method: Method, model: nn.Module, total_steps: int | None = None, tasks: Sequence[str] = ()
) -> PeftConfig:
    """The config for `get_peft_model`.

    Args:
        model: the base model; it tells the default targets.
        total_steps: optimizer steps of the run, over which AdaLoRA spreads its rank schedule; None: unknown.
        tasks: names of the run's, for methods that have parameters of each; none: unknown.

    Raises:
        InputError: the run has more tasks than the method is told.
    """
    options = dict(method.options)
    fields = adapter_fields(method.base, method.routed)
    if "total_step" in fields:
        options.setdefault("total_step", total_steps)
    if "num_tasks" in fields and tasks:
        if options.setdefault("num_tasks", len(tasks)) < len(tasks):
            raise InputError(
                f"method.num_tasks: {options['num_tasks']}, but data.tasks has {len(tasks)}", hint="leave num_tasks out"
            )
        options["task_names"] = list(tasks)
    preset = PRESETS[method.preset].config
    if (
        not method.routed
        and "target_modules" in fields
        and not ("target_modules" in options or "target_modules" in preset)
    ):
        options["target_modules"] = default_targets(model)  # the same modules as with routing
    return _build(method.base, method.routed, method.preset, {"task_type": "CAUSAL_LM", **options})


def add_adapter(model: nn.Module, config: PeftConfig, name: str, **options: Any) -> PeftModel:
    """`get_peft_model`, whose refusals are a person's to mend.

    Raises:
        InputError: the model and the method do not fit.
    """
    try:
        return get_peft_model(model, config, **options)
    except ValueError as error:
        raise InputError(
            f"model: '{name}' cannot take the adapters: {error}", hint="correct method.target_modules, or the model"
        ) from error


def _class_of(base: str, routed: bool) -> type[PeftConfig]:
    key = str(base).upper()
    names = [str(member.value) for member in PEFT_TYPE_TO_CONFIG_MAPPING if not member.value.startswith("MJ_")]
    if routed and key in names:
        return config_class(base)
    if key not in names:
        named = [name.lower() for name in names if not routed or name.lower() in routable() or _is_mixture(name)]
        raise ValueError(
            f"base={base!r} is not known: {did_you_mean(str(base), named)}choose one of {', '.join(sorted(named))}"
        )
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[key]]


def _is_mixture(base: str) -> bool:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType._member_map_.get(str(base).upper()))
    return cls is not None and issubclass(cls, ExpertConfig)


def _build(base: str, routed: bool, preset: str, options: dict[str, Any]) -> PeftConfig:
    cls = _class_of(base, routed)
    takes = {field.name for field in dataclasses.fields(cls)}
    for name, stands_in in (("total_step", UNKNOWN_STEPS), ("num_tasks", 1)):
        if name in takes and options.get(name) is None:
            options = {**options, name: stands_in}
    if routed:
        return MonkeyJumpConfig.from_preset(preset, **{"base": base, **options})
    chosen = {**(MonkeyJumpConfig.default_of_lora if issubclass(cls, LoraConfig) else {}), **PRESETS[preset].config}
    chosen = {name: value for name, value in chosen.items() if name not in OF_ROUTING}
    if "target_r" in takes and "r" in PRESETS[preset].config:  # as MonkeyJumpConfig.from_preset does
        rank = chosen.pop("r")
        chosen |= {"target_r": rank, "init_r": math.ceil(1.5 * rank)}
    return cls(**{**{k: v for k, v in chosen.items() if k in takes}, **options})

"""Several methods and seeds over the same data: one run each, in one folder, taken up where they were left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from typing import Any

from monkeyjump.methods import METHODS
from monkeyjump.tasks.errors import InputError
from monkeyjump.training.adapters import adapter_fields, check_method, fields_of_comparison
from monkeyjump.training.config import Method, RunConfig

ROUTED = "mj-"


def method_named(name: str, method: Method) -> Method:
    """`mj-lora` is LoRA with routing, `lora` without, `moelora` a mixture; the other fields stay. Raises InputError.

    Names are those of `monkeyjump methods`, and of all of PEFT's methods with and without `mj-`.
    """
    row = METHODS.get(name)
    base = row.base if row else name.removeprefix(ROUTED).replace("-", "_")
    routed = row.routed if row else name.startswith(ROUTED)
    try:
        known = adapter_fields(base, routed).keys() - set(row.unread if row else ())
        options = {**_fitting(method.options, known), **(row.options if row else {})}
        check_method(base, routed, method.preset, options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--methods: '{name}': {error}", hint="write lora, mj-lora, moelora, ...: `monkeyjump methods` lists them"
        ) from error
    return Method(base=base, routed=routed, preset=method.preset, centers=method.centers, **options)


def _fitting(options: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    """The fields that mean something to a method; what means nothing to any method is left for it to refuse.

    A rank `r` is AdaLoRA's `target_r`, which it starts half above, as in presets.
    """
    if "target_r" in known and "r" in options and not {"target_r", "init_r"} & options.keys():
        options = {**options, "target_r": options["r"], "init_r": math.ceil(1.5 * options["r"])}
    left_out = fields_of_comparison() - known
    return {name: value for name, value in options.items() if name not in left_out}


def sweep(config: RunConfig, methods: Sequence[str], seeds: Sequence[int]) -> Iterator[RunConfig]:
    """One config per seed and method, seeds outside: after every round all methods have had the same seeds."""
    named = {name: method_named(name, config.method) for name in methods} or {_name_of(config.method): config.method}
    for seed in seeds or (config.train.seed,):
        for name, method in named.items():
            centers = method.centers.model_copy(update={"seed": seed})
            yield config.model_copy(
                update={
                    "method": method.model_copy(update={"centers": centers}),
                    "train": config.train.model_copy(update={"seed": seed}),
                    "output": config.output.model_copy(update={"folder": config.output.folder / f"{name}-seed{seed}"}),
                }
            )


def _name_of(method: Method) -> str:
    return (ROUTED if method.routed else "") + method.base.replace("_", "-")

"""Several methods and seeds over the same data: one run each, in one folder, taken up where they were left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from monkeyjump.tasks.errors import InputError
from monkeyjump.training.adapters import adapter_fields, check_method
from monkeyjump.training.config import Method, RunConfig

ROUTED = "mj-"


def method_named(name: str, method: Method) -> Method:
    """`mj-lora` is LoRA with routing, `lora` without; the other fields stay. Raises InputError."""
    routed = name.startswith(ROUTED)
    base = name.removeprefix(ROUTED).replace("-", "_")
    try:
        check_method(base, routed, method.preset, _fitting(method, base, routed))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--methods: '{name}': {error}", hint="write lora, mj-lora, lora-fa, mj-lora-fa, ..."
        ) from error
    return Method(
        base=base, routed=routed, preset=method.preset, centers=method.centers, **_fitting(method, base, routed)
    )


def _fitting(method: Method, base: str, routed: bool) -> dict[str, object]:
    """The fields of routing mean nothing to a plain method: left out there, and there alone."""
    known = adapter_fields(base, routed)
    of_routing = adapter_fields(base, True).keys() - adapter_fields(base, False).keys() if not routed else set()
    return {name: value for name, value in method.options.items() if name in known or name not in of_routing}


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

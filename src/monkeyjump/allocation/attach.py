"""Put an allocation on a model, prove that it trains, merge it, take it off.

    plan = allocate_peft(model, taylor_importance(model, batches))
    attach_peft(model, plan, probe=batch)     # a backward pass reaches every trainable tensor, or an error
    Trainer(model, ...).train()
    save_peft(model, "adapters"); merge_peft(model)

The model keeps its class and its modules; its other parameters are frozen. Attach before other parametrizations
(masks): those then act on the adapted weight, so that a gate of 0 removes the adapter's part too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.allocation.importance import Batch, Loss, model_loss
from monkeyjump.allocation.matrices import known_matrices
from monkeyjump.allocation.parametrization import (
    LowRank,
    adapters_on,
    foreign_parametrizations,
    put_ia3,
    put_lora,
    take_off,
)
from monkeyjump.allocation.plan import PeftPlan
from monkeyjump.tuner.folder import fingerprint

ATTACHED = "allocated_peft"  # attribute of the model
NAMED = 8  # modules that an error lists


@dataclass(frozen=True)
class Attached:
    """What a model with an allocation remembers of it."""

    plan: PeftPlan
    base_fingerprint: dict[str, list[float]]


def attached(model: nn.Module) -> Attached:
    """What is attached to a model.

    Raises:
        ValueError: nothing is.
    """
    found = model.__dict__.get(ATTACHED)
    if found is None:
        raise ValueError("this model has no allocated adapters; put some on it with attach_peft(model, plan, probe)")
    return found


def attach_peft(model: nn.Module, plan: PeftPlan, probe: Batch | None, loss: Loss = model_loss) -> None:
    """Adapt the modules of a plan and freeze everything else.

    Args:
        probe: a batch with labels. One backward pass on it, in training mode, must reach every adapter; weights,
            gradients and random state are as before afterwards. None: the adapters are not to be trained.
        loss: of (model, batch); default: the model's own.

    Raises:
        ValueError: a module is unknown or adapted already, the plan adapts nothing, or a trainable tensor gets no
            gradient (its module is not read by this model's forward). The model is then as it was.
    """
    _check_free(model, plan)
    found = Attached(plan, fingerprint(model))
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    for one in plan.modules:
        module = model.get_submodule(one.name)
        if one.kind == "lora":
            put_lora(module, one.rank, plan.scale)
        elif one.kind == "ia3":
            put_ia3(module)
    model.__dict__[ATTACHED] = found
    if probe is None:
        for parameter in adapter_parameters(model).values():
            parameter.requires_grad_(False)
        return
    try:
        probe_gradients(model, probe, loss)
    except BaseException:
        remove_peft(model)
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        raise


def _check_free(model: nn.Module, plan: PeftPlan) -> None:
    if ATTACHED in model.__dict__:
        raise ValueError("this model has allocated adapters already; merge_peft or remove_peft first")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise ValueError(f"{name} is adapted by PEFT already; unload or merge that adapter first")
    known_matrices(model, [one.name for one in plan.modules], "plan")
    if not plan.parameters:
        raise ValueError("the plan adapts no module; raise peft_application_ratio")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' own parameters by "module.lora_A", "module.lora_B" and "module.ia3_l"."""
    found: dict[str, nn.Parameter] = {}
    for one in attached(model).plan.modules:
        for adapter in adapters_on(model.get_submodule(one.name)).values():
            found |= {f"{one.name}.{name}": parameter for name, parameter in adapter.named_parameters()}
    return found


def probe_gradients(model: nn.Module, batch: Batch, loss: Loss = model_loss) -> None:
    """One backward pass that must reach every trainable tensor of the model.

    B of LoRA is 0 at the start, which makes A's gradient 0 as well: for the pass it holds random numbers.

    Raises:
        ValueError: naming the tensors whose gradient is missing, 0 or not finite.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with _undisturbed(model, trainable), torch.enable_grad():
        loss(model, batch).backward()
        silent = [name for name, p in trainable.items() if p.grad is None or not bool(p.grad.any())]
        broken = [name for name, p in trainable.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if silent:
        raise ValueError(
            f"no gradient reaches {len(silent)} of {len(trainable)} trainable tensors in a probe backward pass: "
            f"{_listed(silent)}; leave these modules out of the scores, or patch the model so that it reads them"
        )
    if broken:
        raise ValueError(
            f"the gradient of {len(broken)} of {len(trainable)} trainable tensors is not finite in a probe backward "
            f"pass: {_listed(broken)}; check the batch and the base model's dtype"
        )


def _listed(names: list[str]) -> str:
    plain = [name.replace(".parametrizations.weight.0", "") for name in names]
    more = f" and {len(plain) - NAMED} more" if len(plain) > NAMED else ""
    return ", ".join(plain[:NAMED]) + more


@contextmanager
def _undisturbed(model: nn.Module, trainable: dict[str, nn.Parameter]) -> Iterator[None]:
    """Training mode, random B, no gradients; modes, B, gradients and random states as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in trainable.values()]
    starts = [
        (module.lora_B, module.lora_B.detach().clone()) for module in model.modules() if isinstance(module, LowRank)
    ]
    devices = sorted({parameter.device.index for parameter in trainable.values() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            for b, start in starts:
                b.data.copy_(start + 1e-3 * torch.randn_like(start))
            model.train()
            yield
        finally:
            for b, start in starts:
                b.data.copy_(start)
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, training in modes:
                module.training = training


def merge_peft(model: nn.Module) -> None:
    """Fold the adapters into the weights: a plain model again, with the same logits.

    Raises:
        ValueError: nothing is attached, or another parametrization (a mask) lies on an adapted weight.
    """
    _take_off(model, merge=True)


def remove_peft(model: nn.Module) -> None:
    """Take the adapters off: the base model again. Raises ValueError as `merge_peft` does."""
    _take_off(model, merge=False)


def _take_off(model: nn.Module, merge: bool) -> None:
    modules: dict[str, Any] = {one.name: model.get_submodule(one.name) for one in attached(model).plan.modules}
    for name, module in modules.items():
        if foreign := foreign_parametrizations(module):
            raise ValueError(
                f"{name}.{foreign[0]} has another parametrization beside its adapter (a mask?), which would go with "
                "it; export or remove that one first"
            )
    for module in modules.values():
        take_off(module, merge)
    del model.__dict__[ATTACHED]


def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, named as in `adapter_parameters`, into the adapters.

    Raises:
        ValueError: naming the first five that are missing, unknown, not finite or of another shape.
    """
    wanted = adapter_parameters(model)
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} is unknown" for name in tensors if name not in wanted]
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            wrong.append(f"{name} is {list(tensors[name].shape)}, the plan says {list(wanted[name].shape)}")
        elif not tensors[name].isfinite().all():
            wrong.append(f"{name} holds values that are not finite")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the adapters do not fit: {'; '.join(wrong[:5])}{more}; copy the folder again")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])

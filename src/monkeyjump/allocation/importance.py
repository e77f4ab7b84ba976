"""How much each module matters: one number a module, from gradients or from mask logits.

    taylor       mean over batches of  sum |w * dL/dw|  / number of weights      (Molchanov et al., 2019, first order)
    kept_gates   share of the module's mask logits above 0: gates that survive the export
    mask_logit   mean |L|           the README's; rewards gates that are surely off as much as surely on ones
    mask_mean    mean sigmoid(L)    the README's; says little where every layer is driven to one sparsity
    shuffled     any of them with the scores dealt out to other modules: the control

The sum is taken batch by batch, because the gradient of the mean loss vanishes at a trained model. Per weight,
because a sum alone ranks modules by their size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monkeyjump.allocation.matrices import adaptable_modules, known_matrices, plain_weight
from monkeyjump.suggest import check_choice

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]

MEANING = {
    "taylor": "mean |w * dL/dw| per weight",
    "kept_gates": "share of gates kept",
    "mask_logit": "mean |mask logit|",
    "mask_mean": "mean mask probability",
    "given": "score given by the caller",
    "none": "no score: every module alike",
}


@dataclass(frozen=True)
class Importance:
    """Scores by module path, and the name of what they are (a key of `MEANING`, with "shuffled " before it)."""

    method: str
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def meaning(self) -> str:
        return MEANING[self.method.removeprefix("shuffled ")]


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels.

    Raises:
        ValueError: it returns none.
    """
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("the batch has no 'labels', so the model returns no loss; add them, or pass loss=")
    return loss


def taylor_importance(
    model: nn.Module, batches: Iterable[Batch], modules: Iterable[str] | None = None, loss: Loss = model_loss
) -> Importance:
    """First-order importance of modules: what the loss would change by, were their weights removed one by one.

    Takes one forward and backward pass a batch, in evaluation mode; gradients, modes and `requires_grad` of the
    model are left as they were.

    Args:
        batches: a few batches with labels, on the model's device.
        modules: paths; default: every module that an adapter can be put on.
        loss: of (model, batch); default: the model's own.

    Raises:
        ValueError: no batch, an unknown module, a loss or gradient that is not finite.
    """
    names = list(adaptable_modules(model) if modules is None else known_matrices(model, modules, "modules"))
    weights = [plain_weight(model.get_submodule(name)) for name in names]
    sums, count = torch.zeros(len(names), dtype=torch.float64), 0
    with _only_trainable(model, weights), torch.enable_grad():
        for batch in batches:
            count += 1
            gradients = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
            pairs = zip(weights, gradients)
            sums += torch.stack([torch.zeros(()).double() if g is None else _moved(w, g) for w, g in pairs])
    if not count:
        raise ValueError("batches is empty; taylor_importance needs at least one batch with labels")
    scores = (sums / count).tolist()
    _check_finite(dict(zip(names, scores)))
    return Importance("taylor", dict(zip(names, scores)))


def _moved(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight.detach().float() * gradient.float()).abs().mean().double().cpu()


@contextmanager
def _only_trainable(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for `weights` alone, everything in evaluation mode; both as before afterwards."""
    parameters, modules = list(model.parameters()), list(model.modules())
    asked, modes = [p.requires_grad for p in parameters], [m.training for m in modules]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        model.eval()
        yield
    finally:
        for parameter, wanted in zip(parameters, asked):
            parameter.requires_grad_(wanted)
        for module, training in zip(modules, modes):
            module.training = training


def mask_importance(logits: Mapping[str, Tensor], method: str = "kept_gates") -> Importance:
    """Importance of modules from the logits of the masks on them.

    Args:
        logits: by module path, of any shape.
        method: "kept_gates", "mask_logit" or "mask_mean".

    Raises:
        ValueError: an unknown method, an empty mask, a logit that is not finite.
    """
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "kept_gates": lambda given: given > 0,
        "mask_logit": torch.abs,
        "mask_mean": torch.sigmoid,
    }
    check_choice("method", method, reduce)
    scores = {name: float(reduce[method](given.detach().double()).double().mean()) for name, given in logits.items()}
    _check_finite(scores)
    return Importance(method, scores)


def shuffled(importance: Importance, seed: int) -> Importance:
    """The same scores, dealt out to the modules at random."""
    names = list(importance.scores)
    dealt = random.Random(seed).sample(names, len(names))
    scores = {name: importance.scores[other] for name, other in zip(names, dealt)}
    return Importance(f"shuffled {importance.method.removeprefix('shuffled ')}", scores)


def _check_finite(scores: Mapping[str, float]) -> None:
    for name, score in scores.items():
        if not abs(score) < float("inf"):
            raise ValueError(f"the importance of {name} is {score}; check the batches and masks for NaN and infinity")

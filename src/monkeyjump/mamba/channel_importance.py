"""How much the loss would change without a channel: first-order Taylor scores.

Put a gate `g = 1` on a unit; to first order its removal changes the loss by `g * dL/dg`, and by the chain rule
`dL/dg = sum(w * dL/dw)` over the rows that the gate multiplies (Molchanov et al., 2019, arXiv:1906.10771). So no gate
has to exist: one backward pass through the model as it is gives every unit's score. The absolute values of the batches
are added up; scores of different layers are in the same unit, that of the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from monkeyjump.mamba.channel_group import ChannelGroup, unit_rows
from monkeyjump.mamba.evaluating import Batch, evaluating


def channel_importance(
    model: nn.Module, batches: Iterable[Batch], groups: Mapping[str, ChannelGroup]
) -> dict[str, Tensor]:
    """Score of every unit, float32 `[units]` per group. `batches` are the model's keyword arguments, with labels.

    Weights may be frozen; nothing of the model is changed, its gradients included.

    Raises `ValueError` if a batch gives no loss or there is no batch.
    """
    scores = {name: torch.zeros(group.units) for name, group in groups.items()}
    batches_seen = 0
    with evaluating(model), _thawed(groups):
        for batch in batches:
            batches_seen += 1
            for name, score in _batch_scores(model, batch, groups).items():
                scores[name] += score.abs().float().cpu()
    if not batches_seen:
        raise ValueError("batches is empty: importance of the channels needs at least one batch")
    return scores


def gated(group: ChannelGroup) -> list[tuple[str, str]]:
    """The tensors `(owner, name)` that the group's gate multiplies, each once."""
    return list(dict.fromkeys((place.owner, place.name) for place in group.gated))


def _batch_scores(model: nn.Module, batch: Batch, groups: Mapping[str, ChannelGroup]) -> dict[str, Tensor]:
    with torch.enable_grad(), parametrize.cached():  # a parametrized weight is then one tensor, which has a gradient
        loss = model(**batch).loss  # first: masks are decided by a hook of this pass, and cached weights would not know
        if loss is None:
            raise ValueError(f"a batch with the keys {', '.join(batch)} gives no loss: add labels to it")
        gates = [(name, place, tensor) for name, group in groups.items() for place, tensor in _gated_tensors(group)]
        gradients = torch.autograd.grad(loss, [tensor for _, _, tensor in gates], materialize_grads=True)
    scores = {name: torch.zeros(group.units + 1) for name, group in groups.items()}
    for (name, (owner, field), tensor), gradient in zip(gates, gradients):
        rows = (tensor * gradient).detach().flatten(1).sum(1) if tensor.ndim > 1 else (tensor * gradient).detach()
        scores[name].index_add_(0, unit_rows(groups[name], owner, field, len(rows)), rows.float().cpu())
    return {name: score[:-1] for name, score in scores.items()}


def _gated_tensors(group: ChannelGroup) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """What the gate multiplies; of `W + B A` as a PEFT layer, the rows of `W` and of `B`."""
    for owner, name in gated(group):
        module = group.block.get_submodule(owner)
        if isinstance(module, BaseTunerLayer):
            yield (owner, name), getattr(module.get_base_layer(), name)
        else:
            yield (owner, name), getattr(module, name)
        if isinstance(module, LoraLayer) and name == "weight":
            yield from (((owner, name), factor.weight) for factor in module.lora_B.values())


@contextmanager
def _thawed(groups: Mapping[str, ChannelGroup]) -> Iterator[None]:
    """The gated weights require a gradient inside, and afterwards as before."""
    owners = {group.block.get_submodule(owner) for group in groups.values() for owner, _ in gated(group)}
    frozen = [tensor for owner in owners for tensor in owner.parameters() if not tensor.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)

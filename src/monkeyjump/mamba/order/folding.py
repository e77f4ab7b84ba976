"""Folding an order of the channels into the weights: the same function, with the channels elsewhere.

Every tensor of a block that the channels index is indexed anew (`channels.py` says where they lie), the gradient and
the optimizer's moments along with it. Nothing is gathered at run time, and the stream outside the block stays as it
was; a sum over the channels is taken in another order, hence equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monkeyjump.mamba.channel_group import ChannelGroup, axis_index, places_by_axis, section_of
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.order.carriers import Carrier, carriers, move
from monkeyjump.suggest import did_you_mean

Moves = dict[int, tuple[Carrier, Tensor]]  # by the parameter's id: one that two tensors share moves once


def fold(model: nn.Module, orders: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Move the channels of each named block: new channel `i` is the old channel `order[i]`.

    `orders`: block path (see `channel_groups`) -> `int64 [units]`. `optimizer`: the one that trains the model, in the
    middle of training; its state tensors of a parameter's shape (AdamW's exp_avg and exp_avg_sq) move along.

    Raises `ValueError`, before anything has moved, for an unknown block, for what is not an order of its units, for a
    weight that cannot be moved, and for an optimizer whose state has another shape than its parameter.
    """
    groups = channel_groups(model)
    moves: Moves = {}
    for name, order in orders.items():
        if name not in groups:
            raise ValueError(
                f"orders has {name!r}, which is no block of this model: {did_you_mean(name, groups)}"
                f"the first is {next(iter(groups))!r}"
            )
        check_order(groups[name], order)
        moves |= _moves(groups[name], order)
    states = {id(carrier[0]): state_of(optimizer, carrier[0]) for carrier, _ in moves.values()}
    for key, ((parameter, axis), index) in moves.items():
        move(parameter, axis, index, states[key])


def inverse(order: Tensor) -> Tensor:
    """The order that undoes `order`."""
    return torch.argsort(order)


def check_order(group: ChannelGroup, order: Tensor) -> None:
    """Raise `ValueError` unless `order` permutes the group's units within their sections."""
    if not torch.equal(order.sort().values, torch.arange(group.units)):
        raise ValueError(
            f"the order of {group.name} is no permutation of its {group.units} units: "
            f"give each of 0 to {group.units - 1} once"
        )
    section = section_of(group)
    if not torch.equal(section[order], section):
        raise ValueError(
            f"the order of {group.name} moves heads between its {group.sections} groups, "
            f"which share B and C: order each group by itself"
        )


def state_of(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's state of one parameter.

    Raises `ValueError` if a tensor in it neither is a number nor has the parameter's shape (Adafactor, 8-bit Adam).
    """
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}, which cannot follow an order of the channels: use AdamW or SGD"
            )
    return state


def _moves(group: ChannelGroup, order: Tensor) -> Moves:
    found: Moves = {}
    for (owner, name, axis), places in places_by_axis(group).items():
        module = group.block.get_submodule(owner)
        where = f"{group.name}.{owner}".rstrip(".")
        for parameter, along in carriers(module, name, axis, where):
            index = axis_index(parameter.shape[along], places, group.units, order)
            found[id(parameter)] = ((parameter, along), index)
    return found

"""`shrink`: take units out of a model for good. Every tensor that they index gets smaller, and with it every pass.

What is left computes what the model with gates of 0 on the removed units computes, up to rounding. In Mamba-2 the gated
norm divides by the mean over all channels of a group, zeros of removed ones included; with k of S left

    w x / sqrt(sum / S + eps) = w sqrt(S / k) x / sqrt(sum / k + eps S / k),

so its weight grows by sqrt(S / k) and its eps by S / k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from monkeyjump.mamba.channel_group import ChannelGroup, axis_index, places_by_axis, section_of
from monkeyjump.mamba.channels import channel_groups, state_groups
from monkeyjump.suggest import did_you_mean

WIDTHS = "monkeyjump_widths"  # in the model's config: units of every group that is narrower than the config says
Model = TypeVar("Model", bound=nn.Module)


def shrink(model: Model, keep: Mapping[str, Tensor]) -> Model:
    """Remove, in place, all units but those that `keep` names; returns the same model.

    `keep`: ascending `int64` units per group (`select_kept`, `LearnedMasks.kept`); groups it does not name stay whole.
    Parameters are replaced: make the optimizer afterwards. The widths go into `model.config`, so that `save_pretrained`
    keeps them; `load_shrunk` reads them back, which Hugging Face's own `from_pretrained` cannot.

    Raises `ValueError`, before anything has changed, for unknown groups, units that are not ascending or out of range,
    groups of heads left unequal, gates or adapters on what would shrink, and sharded or quantized weights.
    """
    names = {name: name.endswith(":states") for name in keep}
    groups = _groups(model, any(names.values()))
    for name, units in keep.items():
        if name not in groups:
            raise ValueError(
                f"keep has {name!r}, which is no block of this model: {did_you_mean(name, groups)}"
                f"the first is {next(iter(groups))!r}"
            )
        _check_units(groups[name], units)
        _refuse_covered(groups[name])
    for states in sorted(set(names.values())):  # channels first: where states lie depends on their number
        groups = _groups(model, states)
        for name in (name for name, of_states in names.items() if of_states == states):
            _remove(groups[name], keep[name])
    if isinstance(model, PreTrainedModel):
        known = model.config.to_dict().get(WIDTHS, {})
        setattr(model.config, WIDTHS, {**known, **{name: len(units) for name, units in keep.items()}})
    return model


def narrow(model: Model, widths: Mapping[str, int]) -> Model:
    """Give every group the width it has in `widths`, whatever the weights: before a state dict is loaded."""
    groups = _groups(model, any(name.endswith(":states") for name in widths))
    keep = {}
    for name, units in widths.items():
        group = groups.get(name)
        if group is None or not isinstance(units, int) or not 0 < units <= group.units or units % group.sections:
            limit = "none of this model's blocks" if group is None else f"a block of {group.units} units"
            raise ValueError(f"{WIDTHS} in config.json gives {name!r} {units!r} units, but that is {limit}")
        whole, part = group.units // group.sections, units // group.sections
        keep[name] = torch.cat([torch.arange(part) + whole * section for section in range(group.sections)])
    return shrink(model, keep)


def _groups(model: nn.Module, states: bool) -> dict[str, ChannelGroup]:
    return {**channel_groups(model), **(state_groups(model) if states else {})}


def _check_units(group: ChannelGroup, units: Tensor) -> None:
    inside = units.dtype == torch.int64 and units.ndim == 1 and len(units) > 0
    if not (inside and units[0] >= 0 and units[-1] < group.units and bool((units.diff() > 0).all())):
        raise ValueError(
            f"keep[{group.name!r}] must be ascending int64 units between 0 and {group.units - 1}, at least one of them"
        )
    per_section = torch.bincount(section_of(group)[units], minlength=group.sections)
    if len(set(per_section.tolist())) > 1:
        raise ValueError(
            f"keep[{group.name!r}] leaves {per_section.tolist()} heads in its {group.sections} groups: "
            f"keep as many in each"
        )


def _refuse_covered(group: ChannelGroup) -> None:
    for owner, name, _ in places_by_axis(group):
        module: Any = group.block.get_submodule(owner)
        where = f"{group.name}.{owner}".rstrip(".")
        if isinstance(module, BaseTunerLayer):
            raise ValueError(f"{where} carries an adapter ({type(module).__name__}): merge it before shrinking")
        if parametrize.is_parametrized(module, name):
            found = ", ".join(type(step).__name__ for step in module.parametrizations[name])
            raise ValueError(
                f"{where}.{name} carries {found}: remove the masks (LearnedMasks.remove) and merge adapters "
                f"before shrinking"
            )
        tensor = getattr(module, name)
        if type(tensor.data) is not Tensor or not tensor.is_floating_point():
            raise ValueError(f"{where}.{name} is a {type(tensor.data).__name__} of {tensor.dtype}: shrink a whole one")


def _remove(group: ChannelGroup, units: Tensor) -> None:
    for (owner, name, axis), places in places_by_axis(group).items():
        module: Any = group.block.get_submodule(owner)
        old = getattr(module, name)
        index = axis_index(old.shape[axis], places, group.units, units).to(old.device)
        new = old.detach().index_select(axis, index)
        if owner == "norm":
            new *= math.sqrt(group.units / len(units))
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
        _say_shape(module)
    group.resize(group.block, len(units))


def _say_shape(module: nn.Module) -> None:
    """What linear maps and convolutions say of themselves follows their weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):
        module.in_channels = module.out_channels = module.groups = module.weight.shape[0]

"""The blocks whose channels, heads or states can change places or go, and where these lie:

    Mamba   in_proj [2D, d]    rows c and D + c      conv1d [D, 1, k] rows     x_proj [R + 2N, D] columns
            dt_proj [D, R]     rows and bias         A_log [D, N], D [D] rows  out_proj [d, D]    columns
    Mamba-2 in_proj [2D + 2GN + H, d]: gate (D), x (D), B (GN), C (GN), dt (H); conv1d over x, B, C; norm [D]
            (also that of Bamba, Zamba2, NemotronH and GraniteMoeHybrid)
    MLP     gate_proj, up_proj [D, d] rows; down_proj [d, D] columns

A unit whose `gated` places are 0 is removed exactly: conv1d gives 0, the activation keeps 0, and with it the state, the
skip `D * u`, and what the unit adds to x_proj, norm and out_proj are 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from monkeyjump.mamba.channel_group import ChannelGroup, Place
from monkeyjump.mamba.patch import STOCK
from monkeyjump.mamba.patch_mixers import SCANNING

MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATE = "channel_gate"  # the submodule of a block that holds the logits of its learned mask

Describe = Callable[[str, Any], ChannelGroup]


def channel_groups(model: nn.Module, mlps: bool = True) -> dict[str, ChannelGroup]:
    """The inner channels (heads) of every mixer and, with `mlps`, of every gated MLP, by the block's path.

    Raises `ValueError` if the model has none.
    """
    groups = {}
    for name, module in model.named_modules():
        describe = _mlp_group if mlps and _is_gated_mlp(module) else _known(module, MIXERS)
        if describe is not None:
            groups[name] = _with_gate(describe(name, module))
    if not groups:
        raise ValueError(
            f"model={type(model).__name__} has no block whose channels are known: "
            f"it takes {_names(MIXERS)} or an MLP of {', '.join(MLP_PROJECTIONS)}"
        )
    return groups


def unknown_mixers(model: nn.Module) -> dict[str, int]:
    """How many Mamba mixers of each class the model has whose channels can neither change places nor go."""
    stock = (STOCK.get(type(module), type(module)) for module in model.modules())
    return dict(Counter(cls.__name__ for cls in stock if cls in SCANNING and cls not in MIXERS))


def state_groups(model: nn.Module) -> dict[str, ChannelGroup]:
    """The scan's states of every Mamba and Mamba-2 mixer. Models that normalize B and C over the states have none.

    Raises `ValueError` if the model has none.
    """
    groups = {}
    for name, module in model.named_modules():
        describe = _known(module, STATES)
        if describe is not None:
            groups[f"{name}:states"] = describe(f"{name}:states", module)
    if not groups:
        raise ValueError(f"model={type(model).__name__} has no scan whose states can go: it takes {_names(STATES)}")
    return groups


def _is_gated_mlp(module: nn.Module) -> bool:
    return set(MLP_PROJECTIONS) <= dict(module.named_children()).keys()


def _known(module: nn.Module, table: Mapping[type[nn.Module], Describe]) -> Describe | None:
    """Of the module's class or one that it is a subclass of (our patched mixers)."""
    return next((describe for cls, describe in table.items() if isinstance(module, cls)), None)


def _names(table: Mapping[type[nn.Module], Describe]) -> str:
    return ", ".join(cls.__name__ for cls in table)


def _with_gate(group: ChannelGroup) -> ChannelGroup:
    """A learned mask has its logits per unit, which move with it."""
    if GATE not in dict(group.block.named_children()):
        return group
    return replace(group, places=(*group.places, Place(GATE, "logits", 0), Place(GATE, "learned", 0)))


def _mlp_group(name: str, block: Any) -> ChannelGroup:
    units = block.get_submodule("up_proj").weight.shape[0]
    rows = [*_rows(block, "gate_proj"), *_rows(block, "up_proj")]
    return ChannelGroup(
        name=name,
        kind="mlp",
        block=block,
        units=units,
        places=(*rows, Place("down_proj", "weight", 1)),
        gated=tuple(_rows(block, "up_proj")),
        reader="down_proj",
        resize=_resize_mlp,
    )


def _mamba_group(name: str, block: Any) -> ChannelGroup:
    units = block.A_log.shape[0]
    _refuse_open_activation(name, block)
    return ChannelGroup(
        name=name,
        kind="channel",
        block=block,
        units=units,
        places=(
            *_rows(block, "in_proj"),
            *_rows(block, "in_proj", start=units),
            *_rows(block, "conv1d"),
            Place("x_proj", "weight", 1),
            *_rows(block, "dt_proj"),
            Place("", "A_log", 0),
            Place("", "D", 0),
            Place("out_proj", "weight", 1),
        ),
        gated=tuple(_rows(block, "conv1d")),
        reader="out_proj",
        resize=_resize_mamba,
    )


def _mamba2_group(name: str, block: Any) -> ChannelGroup:
    units, width = block.A_log.shape[0], block.head_dim
    inner, shared = units * width, 2 * block.n_groups * block.ssm_state_size
    _refuse_open_activation(name, block)
    return ChannelGroup(
        name=name,
        kind="head",
        block=block,
        units=units,
        places=(
            *_rows(block, "in_proj", width=width),
            *_rows(block, "in_proj", start=inner, width=width),
            *_rows(block, "in_proj", start=2 * inner + shared),
            *_rows(block, "conv1d", width=width),
            Place("", "dt_bias", 0),
            Place("", "A_log", 0),
            Place("", "D", 0),
            Place("norm", "weight", 0, width=width),
            Place("out_proj", "weight", 1, width=width),
        ),
        gated=tuple(_rows(block, "conv1d", width=width)),
        reader="out_proj",
        width=width,
        sections=block.n_groups,
        resize=_resize_mamba2,
    )


def _mamba_states(name: str, block: Any) -> ChannelGroup:
    """A state is a row of B and of C in x_proj and a column of A_log; with its C at 0 nothing reads it."""
    units, rank = block.A_log.shape[1], block.time_step_rank
    read = tuple(_rows(block, "x_proj", start=rank + units))
    return ChannelGroup(
        name=name,
        kind="state",
        block=block,
        units=units,
        places=(*_rows(block, "x_proj", start=rank), *read, Place("", "A_log", 1)),
        gated=read,
        reader="out_proj",
        resize=_resize_states,
    )


def _mamba2_states(name: str, block: Any) -> ChannelGroup:
    """State n of every group of heads: a row of B and of C per group, in in_proj and in conv1d."""
    units, inner, groups = block.ssm_state_size, block.A_log.shape[0] * block.head_dim, block.n_groups
    written = [inner + group * units for group in range(groups)]
    read = [inner + (groups + group) * units for group in range(groups)]
    convolved = [place for start in (*written, *read) for place in _rows(block, "conv1d", start=start)]
    return ChannelGroup(
        name=name,
        kind="state",
        block=block,
        units=units,
        places=(
            *[place for start in (*written, *read) for place in _rows(block, "in_proj", start=inner + start)],
            *convolved,
        ),
        gated=tuple(place for place in convolved if place.start in read),
        reader="out_proj",
        resize=_resize_mamba2_states,
    )


def _rows(block: Any, owner: str, start: int = 0, width: int = 1) -> list[Place]:
    """The rows of a projection's weight and, where it has one, of its bias."""
    names = ["weight"] if block.get_submodule(owner).bias is None else ["weight", "bias"]
    return [Place(owner, name, 0, start, width) for name in names]


def _refuse_open_activation(name: str, block: Any) -> None:
    if block.act(torch.zeros(1)).item() != 0:
        raise ValueError(
            f"hidden_act={block.activation!r} of {name} does not map 0 to 0, so a gate of 0 removes no channel: "
            f"it takes silu, gelu, relu or tanh"
        )


def _resize_mlp(block: Any, units: int) -> None:
    block.intermediate_size = units  # what LlamaMLP and its kin call it; nothing computes with it


def _resize_mamba(block: Any, units: int) -> None:
    block.intermediate_size = units


def _resize_states(block: Any, units: int) -> None:
    block.ssm_state_size = units


def _resize_mamba2(block: Any, units: int) -> None:
    """The gated norm takes the mean over the channels of a group, which removed channels entered as zeros.

    With k of S channels left: `sum / S + eps = (k / S) (sum / k + eps S / k)`, so eps grows by S / k, and the norm's
    weight (see `shrink`) by sqrt(S / k).
    """
    group_size = units * block.head_dim // block.n_groups
    block.norm.variance_epsilon *= block.norm.group_size / group_size
    block.norm.group_size = group_size
    block.num_heads, block.intermediate_size = units, units * block.head_dim
    _resize_mamba2_states(block, block.ssm_state_size)


def _resize_mamba2_states(block: Any, units: int) -> None:
    block.ssm_state_size = units
    block.conv_dim = block.intermediate_size + 2 * block.n_groups * units


MIXERS: dict[type[nn.Module], Describe] = {
    MambaMixer: _mamba_group,
    FalconMambaMixer: _mamba_group,
    JambaMambaMixer: _mamba_group,
    Mamba2Mixer: _mamba2_group,
    BambaMixer: _mamba2_group,
    Zamba2MambaMixer: _mamba2_group,
    NemotronHMamba2Mixer: _mamba2_group,
    GraniteMoeHybridMambaLayer: _mamba2_group,
}
STATES: dict[type[nn.Module], Describe] = {MambaMixer: _mamba_states} | {
    mixer: _mamba2_states for mixer, describe in MIXERS.items() if describe is _mamba2_group
}

"""The units of a block and where they lie in its tensors: the one map that ordering, masks and shrinking share.

A block has `units` that can change places or go: the inner channels of a Mamba mixer or of a gated MLP, the heads of
a Mamba-2 mixer (`width` channels each), or the states of a scan. Every unit owns some entries of several tensors. To
permute the units, index every place by the same order; to remove units, index by what is kept. Multiplying the `gated`
places of a unit by 0 removes it exactly. Which blocks have units, and where: `channels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """`width` consecutive entries per unit, the first unit's at `start`, along `axis` of the tensor `owner.name`.

    `owner` is a path inside the block, empty for the block itself.
    """

    owner: str
    name: str
    axis: int
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """The units of one block and where they lie.

    `sections` equal runs of units must stay apart (the groups of Mamba-2, which share B and C): an order moves units
    within a section only, and as many are kept in one section as in every other.
    """

    name: str  # path of the block in the model; states carry the suffix ":states"
    kind: str  # channel, head, mlp or state
    block: Any
    units: int
    places: tuple[Place, ...]
    gated: tuple[Place, ...]
    reader: str  # the projection that reads the channels back into the residual stream
    width: int = 1  # channels of the reader per unit
    sections: int = 1
    resize: Callable[[Any, int], None] = field(default=lambda block, units: None)


def axis_index(size: int, places: Sequence[Place], units: int, chosen: Tensor) -> Tensor:
    """Index of one axis that puts the units `chosen` where all `units` were; entries of no unit stay.

    `places` are those of the group on this axis; returns `int64 [size - (units - len(chosen)) * their width]`.
    """
    pieces, end = [], 0
    for place in sorted(places, key=lambda place: place.start):
        pieces.append(torch.arange(end, place.start))
        pieces.append(place.start + spread(chosen, place.width))
        end = place.start + units * place.width
    return torch.cat([*pieces, torch.arange(end, size)])


def spread(units: Tensor, width: int) -> Tensor:
    """`[u]` units as `[u * width]` entries."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def places_by_axis(group: ChannelGroup) -> dict[tuple[str, str, int], list[Place]]:
    """The group's places, together where they share tensor and axis: key `(owner, name, axis)`."""
    found: dict[tuple[str, str, int], list[Place]] = {}
    for place in group.places:
        found.setdefault((place.owner, place.name, place.axis), []).append(place)
    return found


def unit_rows(group: ChannelGroup, owner: str, name: str, rows: int) -> Tensor:
    """`int64 [rows]`: the unit that gates each row of a tensor, `group.units` for rows that none gates."""
    found = torch.full((rows,), group.units)
    for place in group.gated:
        if (place.owner, place.name) == (owner, name):
            assert place.axis == 0
            stop = place.start + group.units * place.width
            found[place.start : stop] = torch.arange(group.units).repeat_interleave(place.width)
    return found


def section_of(group: ChannelGroup) -> Tensor:
    """`int64 [units]`: the section of each unit."""
    return torch.arange(group.units) // (group.units // group.sections)

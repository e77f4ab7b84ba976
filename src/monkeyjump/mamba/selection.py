"""Which units stay: one budget over the whole model, whole blocks of neighbors, an exact count.

Units are chosen in bundles: a run of `block` adjacent units (states go one by one), and where the heads of a block lie
in groups that must stay equally large, the equally ranked run of every group. Bundles are taken by their mean score,
the best of every block first, so that none is emptied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from monkeyjump.mamba.channel_group import ChannelGroup
from monkeyjump.suggest import check_choice

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class _Bundle:
    group: str
    units: Tensor
    score: float
    first: bool  # the best of its group


def select_kept(
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    block: int = 1,
    scope: str = "global",
) -> dict[str, Tensor]:
    """The units that stay, ascending `int64` per group; high scores stay.

    `round((1 - sparsity) * units)` stay, over all groups (`scope="global"`) or in each (`"layer"`); where bundles do
    not divide that number, the largest number below it that they do.

    Raises `ValueError` for a sparsity outside [0, 1), one that leaves no bundle for some group, and a block that does
    not divide a group's units.
    """
    check_choice("scope", scope, SCOPES)
    if not 0 <= sparsity < 1:
        raise ValueError(f"target_sparsity={sparsity!r} must be at least 0 and below 1")
    bundles = {name: _bundles(group, scores[name], block) for name, group in groups.items()}
    if scope == "layer":
        pools = [(groups[name].units, found) for name, found in bundles.items()]
    else:
        pools = [(sum(group.units for group in groups.values()), [b for found in bundles.values() for b in found])]
    chosen = [bundle for total, pool in pools for bundle in _fill(pool, round((1 - sparsity) * total), sparsity)]
    return {
        name: torch.cat([bundle.units for bundle in chosen if bundle.group == name]).sort().values for name in groups
    }


def _bundles(group: ChannelGroup, scores: Tensor, block: int) -> list[_Bundle]:
    block = 1 if group.kind == "state" else block
    per_section = group.units // group.sections
    if block < 1 or per_section % block:
        raise ValueError(f"block={block} does not divide the {per_section} adjacent units of {group.name}")
    runs = torch.arange(group.units).view(group.sections, per_section // block, block)
    means = scores.detach().cpu().double()[runs].mean(-1)  # [sections, runs]
    ranked = means.argsort(dim=1, descending=True, stable=True)
    taken = torch.arange(group.sections)
    return [
        _Bundle(group.name, runs[taken, rank].flatten(), means[taken, rank].mean().item(), first=place == 0)
        for place, rank in enumerate(ranked.T)
    ]


def _fill(pool: list[_Bundle], budget: int, sparsity: float) -> list[_Bundle]:
    chosen, left = [], budget
    for bundle in sorted(pool, key=lambda bundle: (not bundle.first, -bundle.score)):
        if len(bundle.units) <= left:
            chosen.append(bundle)
            left -= len(bundle.units)
        elif bundle.first:
            raise ValueError(
                f"target_sparsity={sparsity} leaves {budget} units, too few for one block of {len(bundle.units)} in "
                f"{bundle.group}: lower target_sparsity or the block"
            )
    return chosen

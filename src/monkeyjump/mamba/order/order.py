"""`ChannelOrder`: measure an order of the inner channels, fold it into the weights, remember it.

An order changes nothing that the model computes and makes nothing faster. It makes channels that belong together
neighbors, so that whole blocks of them can be kept or removed. Repeated updates compose: what is saved always says
where each channel lay in the model as it was first given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from monkeyjump.mamba.channel_group import ChannelGroup, section_of
from monkeyjump.mamba.channel_importance import channel_importance
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.evaluating import Batch
from monkeyjump.mamba.order.folding import fold, inverse
from monkeyjump.mamba.order.statistics import collect_moments, unit_correlation
from monkeyjump.mamba.order.tour import nearest_neighbor_tour, path_cost, two_opt
from monkeyjump.suggest import check_choice

METHODS = ("importance", "correlation", "random", "identity")
ORDER, INVERSE, NAMES = "scan_order.npy", "scan_order_inverse.npy", "scan_order.json"
ABSENT = -1  # fills the rows of blocks narrower than the widest


@dataclass(frozen=True)
class OrderedBlock:
    """What the last update did to one block. The costs are measured by the correlation method only."""

    block: str
    units: int
    correlation_shape: tuple[int, int] | None = None
    cost_before: float | None = None
    cost_after: float | None = None


class ChannelOrder:
    """An order of every block's channels (heads): `importance` (default), `correlation`, `random` or `identity`.

    `importance`: most important first, by first-order Taylor scores. `correlation`: nearest-neighbor tour on
    `1 - |rho|`, shortened by up to `two_opt_sweeps` sweeps of 2-opt. `mlps=False` leaves gated MLPs alone.

    After `update`, `orders` maps each block's path to `int64 [units]`: `orders[b][i]` is the place that channel `i` had
    in the model as it was at the first update. `seconds` is what all updates took, `blocks` what the last one found.
    """

    def __init__(
        self, method: str = "importance", *, seed: int = 0, two_opt_sweeps: int = 0, mlps: bool = True
    ) -> None:
        check_choice("method", method, METHODS)
        if two_opt_sweeps < 0:
            raise ValueError(f"two_opt_sweeps={two_opt_sweeps!r} must be 0 or more")
        self.method, self.seed, self.two_opt_sweeps, self.mlps = method, seed, two_opt_sweeps, mlps
        self.orders: dict[str, Tensor] = {}
        self.blocks: list[OrderedBlock] = []
        self.updates, self.seconds = 0, 0.0

    def update(
        self, model: nn.Module, batches: Iterable[Batch] = (), optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Measure on `batches` (keyword arguments of the model; with labels for importance) and fold.

        `random` and `identity` need no batches. Raises `ValueError` as `fold` and the measurements do.
        """
        start = time.perf_counter()
        groups = channel_groups(model, self.mlps)
        orders, blocks = self._measure(model, batches, groups)
        fold(model, orders, optimizer)
        self.orders = {name: self.orders.get(name, torch.arange(len(new)))[new] for name, new in orders.items()}
        self.blocks, self.updates = blocks, self.updates + 1
        self.seconds += time.perf_counter() - start

    def _measure(
        self, model: nn.Module, batches: Iterable[Batch], groups: Mapping[str, ChannelGroup]
    ) -> tuple[dict[str, Tensor], list[OrderedBlock]]:
        if self.method == "correlation":
            moments = collect_moments(model, batches, groups)
            found = {name: self._tour(group, moments[name].absolute_correlation()) for name, group in groups.items()}
            return {name: order for name, (order, _) in found.items()}, [block for _, block in found.values()]
        blocks = [OrderedBlock(name, group.units) for name, group in groups.items()]
        if self.method == "identity":
            return {name: torch.arange(group.units) for name, group in groups.items()}, blocks
        if self.method == "importance":
            scores = channel_importance(model, batches, groups)
        else:
            generator = torch.Generator().manual_seed(self.seed + self.updates)
            scores = {name: torch.rand(group.units, generator=generator) for name, group in groups.items()}
        return {name: by_score(group, scores[name]) for name, group in groups.items()}, blocks

    def _tour(self, group: ChannelGroup, correlation: Tensor) -> tuple[Tensor, OrderedBlock]:
        cost = (1 - unit_correlation(correlation, group.width)).cpu().numpy()
        pieces = []
        for section in np.split(np.arange(group.units), group.sections):
            inside = cost[np.ix_(section, section)]
            pieces.append(section[two_opt(nearest_neighbor_tour(inside), inside, self.two_opt_sweeps)])
        order = np.concatenate(pieces)
        before, after = path_cost(np.arange(group.units), cost), path_cost(order, cost)
        shape = (correlation.shape[0], correlation.shape[1])
        return torch.from_numpy(order), OrderedBlock(group.name, group.units, shape, before, after)

    def save(self, folder: str | Path) -> None:
        """Write `scan_order.npy` and `scan_order_inverse.npy`, `int64 [blocks, most units]` filled with -1, and
        `scan_order.json`, which names the block of each row."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / ORDER, _padded(list(self.orders.values())), allow_pickle=False)
        np.save(folder / INVERSE, _padded([inverse(order) for order in self.orders.values()]), allow_pickle=False)
        settings: dict[str, Any] = {
            name: getattr(self, name) for name in ("method", "seed", "two_opt_sweeps", "mlps", "updates", "seconds")
        }
        last = [asdict(block) for block in self.blocks]
        text = json.dumps({**settings, "blocks": list(self.orders), "last_update": last}, indent=1)
        (folder / NAMES).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ChannelOrder:
        """What `save` wrote. Raises `ValueError` if the files do not belong together."""
        folder = Path(folder)
        known = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        rows = np.load(folder / ORDER, allow_pickle=False)
        if rows.dtype != np.int64 or rows.ndim != 2 or len(rows) != len(known["blocks"]):
            raise ValueError(
                f"{folder / ORDER} holds {rows.dtype} {rows.shape} where {NAMES} names {len(known['blocks'])} blocks: "
                f"the folder is damaged, take an earlier checkpoint"
            )
        order = cls(known["method"], seed=known["seed"], two_opt_sweeps=known["two_opt_sweeps"], mlps=known["mlps"])
        order.orders = {name: torch.from_numpy(row[row != ABSENT]) for name, row in zip(known["blocks"], rows)}
        order.updates, order.seconds = known["updates"], known["seconds"]
        return order


def by_score(group: ChannelGroup, scores: Tensor) -> Tensor:
    """Highest score first, within each section; ties keep their order."""
    descending = torch.argsort(scores, descending=True, stable=True)
    return descending[torch.argsort(section_of(group)[descending], stable=True)]


def _padded(rows: list[Tensor]) -> np.ndarray:
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), ABSENT, dtype=np.int64)
    for line, row in zip(table, rows):
        line[: len(row)] = row.numpy()
    return table

"""A short open tour through channels: neighbors are strongly correlated.

The cost of a step is `1 - |rho|`. The nearest-neighbor tour starts at the channel that correlates most with all
others and goes on to the nearest one not yet visited; 2-opt then reverses stretches as long as that shortens it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Cost = NDArray[np.float64]


def nearest_neighbor_tour(cost: Cost) -> NDArray[np.int64]:
    """`[n, n]` symmetric costs -> the order of the visits `[n]`; ties go to the lower index."""
    n = len(cost)
    tour = np.empty(n, dtype=np.int64)
    unvisited = np.ones(n, dtype=bool)
    here = int(cost.sum(1).argmin())
    for step in range(n):
        tour[step] = here
        unvisited[here] = False
        if step + 1 < n:
            here = int(np.where(unvisited, cost[here], np.inf).argmin())
    return tour


def two_opt(tour: NDArray[np.int64], cost: Cost, sweeps: int) -> NDArray[np.int64]:
    """Reverse the stretch that shortens the open tour most, for every start in turn; at most `sweeps` times over.

    Reversing `tour[i + 1 .. j]` exchanges the steps `i -> i + 1` and `j -> j + 1` for `i -> j` and `i + 1 -> j + 1`.
    A place that is equally far from all others stands before the first, so that the tour may begin elsewhere too.
    """
    n = len(tour)
    cost = np.pad(cost, (0, 1))
    tour = np.concatenate([[n], tour])
    for _ in range(sweeps):
        shortened = False
        for i in range(n - 1):
            here, following, ends = tour[i], tour[i + 1], tour[i + 2 :]
            gain = cost[here, following] - cost[here, ends]
            gain[:-1] += cost[ends[:-1], ends[1:]] - cost[following, ends[1:]]  # the last has no step after it
            best = int(gain.argmax())
            if gain[best] > 1e-12:
                tour[i + 1 : i + 3 + best] = tour[i + 1 : i + 3 + best][::-1].copy()
                shortened = True
        if not shortened:
            break
    return tour[1:]


def path_cost(order: NDArray[np.int64], cost: Cost) -> float:
    """Sum of the steps of the open tour."""
    return float(cost[order[:-1], order[1:]].sum())

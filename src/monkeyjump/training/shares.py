"""How many rows each task gives to an epoch, and which ones.

Shares are exact counts and not chances: with the same seed a run sees the same rows, and no task vanishes.
"""

from __future__ import annotations

import numpy as np

from monkeyjump.tasks.errors import InputError, near_miss
from monkeyjump.training.config import Data


def share_out(sizes: dict[str, int], data: Data) -> dict[str, int]:
    """Task -> rows per epoch, at least one each.

    A cap acts first. By weight or temperature the capped total is shared out anew; a task that is to give
    more rows than it has repeats some.

    Raises:
        InputError: a weight for a task that is not there.
    """
    unknown = next((name for name in data.weights if name not in sizes), None)
    if unknown is not None:
        raise InputError(f"data.weights: no task '{unknown}'", hint=near_miss(unknown, sizes, "tasks"))
    capped = {name: min(size, data.cap or size) for name, size in sizes.items()}
    if data.temperature is None and not data.weights:
        return capped
    if data.temperature is not None:
        parts = {name: size ** (1 / data.temperature) for name, size in capped.items()}
    else:
        parts = {name: data.weights.get(name, 1.0) for name in capped}
    total, whole = sum(capped.values()), sum(parts.values())
    exact = {name: total * part / whole for name, part in parts.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in by_remainder[: max(0, total - sum(counts.values()))]:
        counts[name] += 1
    return counts


def draw_rows(tasks: np.ndarray, names: list[str], counts: dict[str, int], seed: int) -> np.ndarray:
    """Numbers of the rows of an epoch, task after task; every pass over a task is complete before the next.

    Args:
        tasks: task number of each row that there is.
    """
    drawn = []
    for number, name in enumerate(names):
        mine = np.flatnonzero(tasks == number)
        if counts[name] == len(mine):
            drawn.append(mine)
            continue
        order = np.random.default_rng([seed, number])
        passes = [order.permutation(mine) for _ in range(-(-counts[name] // len(mine)))]
        drawn.append(np.sort(np.concatenate(passes)[: counts[name]]))
    return np.concatenate(drawn)

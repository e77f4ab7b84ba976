"""A uniform sample of a stream of hidden states, in memory that is fixed before the stream starts.

Vitter's algorithm R: the first `capacity` rows fill the slots; a later row, number s (from 1), draws a number
below s and, if that is a slot, takes it. Every row seen so far is then in the sample with equal probability.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from monkeyjump.routing.kmeans import working_memory


class Reservoir:
    """A uniform sample [min(seen, capacity), d] of all rows added, on the CPU.

    The sample depends on the seed and the order of the rows, not on how they are split into batches.
    Choose `dtype=torch.float16` for unit vectors only: raw hidden states reach beyond its 65,504 (`add` then
    raises). For raw states take float32, or bfloat16 with its three digits.
    """

    def __init__(self, capacity: int, dim: int, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity={capacity}, dim={dim}: wanted at least 1 each")
        self.seen = 0
        # Not zeroed: the system hands out pages as they are filled, so a short stream costs little.
        self._slots = torch.empty(capacity, dim, dtype=dtype)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, states: Tensor) -> None:
        """Offer `states` [n, d], any float dtype and device.

        Raises:
            ValueError: another d, or a finite value that the reservoir's dtype cannot hold.
        """
        capacity, dim = self._slots.shape
        if states.ndim != 2 or states.shape[1] != dim:
            raise ValueError(f"wanted states [n, {dim}], got {list(states.shape)}")
        states = states.detach()
        room = min(max(capacity - self.seen, 0), states.shape[0])
        if room:
            self._store(slice(self.seen, self.seen + room), states[:room])
        slots, rows = self._draw(self.seen + room, states.shape[0] - room)
        if len(slots):
            self._store(slots, states[(rows + room).to(states.device)])
        self.seen += states.shape[0]

    def states(self) -> Tensor:
        """The sample [min(seen, capacity), d]: a view, which a later `add` changes."""
        return self._slots[: min(self.seen, len(self._slots))]

    def _draw(self, seen: int, n: int) -> tuple[Tensor, Tensor]:
        """For `n` rows after the first `seen`: slots to overwrite [m], distinct, and the row for each [m]."""
        numbers = torch.arange(seen + 1, seen + n + 1, dtype=torch.float64)
        draws = (torch.rand(n, generator=self._generator, dtype=torch.float64) * numbers).long()
        rows = (draws < len(self._slots)).nonzero().squeeze(1)
        slots, order = draws[rows].sort(stable=True)
        # Of several rows for one slot the last stays, as if they had come one by one.
        last = torch.ones_like(slots, dtype=torch.bool)
        last[:-1] = slots[1:] != slots[:-1]
        return slots[last], rows[order[last]]

    def _store(self, slots: slice | Tensor, states: Tensor) -> None:
        stored = states.to("cpu", self._slots.dtype)
        narrower = torch.finfo(self._slots.dtype).max < torch.finfo(states.dtype).max
        if narrower and bool((stored.isinf() & states.isfinite().cpu()).any()):
            raise ValueError(
                f"a hidden state of {float(states.nan_to_num(0, 0, 0).abs().max()):.3g} does not fit "
                f"{self._slots.dtype}: normalize the states or use a reservoir of torch.float32"
            )
        self._slots[slots] = stored


def rows_within(memory_limit: int, *, dims: Sequence[int], wanted: int, itemsize: int, num_centers: int = 8) -> int:
    """Rows per block, `wanted` at most, such that sampling and clustering stay within `memory_limit` bytes.

    rows * itemsize * sum(dims) + working_memory(rows, max(dims), num_centers) <= memory_limit
    (`dims`: hidden size of each block; the blocks are clustered one after the other).

    Raises:
        ValueError: not even `num_centers` rows fit.
    """
    if not dims:
        raise ValueError("dims: wanted the hidden size of at least one block")
    fixed = working_memory(0, max(dims), num_centers)
    per_row = itemsize * sum(dims) + working_memory(1, max(dims), num_centers) - fixed
    rows = min(wanted, (memory_limit - fixed) // per_row)
    if rows < min(wanted, num_centers):
        raise ValueError(
            f"a memory limit of {memory_limit:,} bytes holds no sample of {num_centers} rows for "
            f"{len(dims)} block(s): {fixed + num_centers * per_row:,} bytes are needed"
        )
    return rows

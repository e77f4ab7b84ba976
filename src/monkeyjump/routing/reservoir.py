"""A uniform sample of a stream of hidden states, in memory that is fixed before the stream starts.

Every row has a number; a hash of seed and number is its priority, and the `capacity` rows of least priority are
kept (bottom-k sampling). Each row seen is then in the sample with equal probability, and which rows are kept
depends on the seed and the rows' numbers alone: not on how they come in batches, and not on how the stream is
divided among processes, whose samples `survivors` puts together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from monkeyjump.routing.kmeans import CHUNK_BYTES, working_memory

BOOKKEEPING = 16  # bytes of a row's number and priority


class Reservoir:
    """A uniform sample [min(seen, capacity), d] of all rows added, on the CPU.

    Choose `dtype=torch.float16` for unit vectors only: raw hidden states reach beyond its 65,504 (`add` then
    raises). For raw states take float32, or bfloat16 with its three digits.

    Attributes:
        seen: rows added.
        numbers: their numbers [min(seen, capacity)], int64, in the order of the slots.
    """

    def __init__(self, capacity: int, dim: int, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
        if capacity < 1 or dim < 1:
            raise ValueError(f"capacity={capacity}, dim={dim}: wanted at least 1 each")
        self.seen = 0
        self.seed = seed
        # Not zeroed: the system hands out pages as they are filled, so a short stream costs little.
        self._slots = torch.empty(capacity, dim, dtype=dtype)
        self._next = 0
        self.numbers = torch.empty(0, dtype=torch.int64)
        self._priorities = torch.empty(0, dtype=torch.int64)

    def add(self, states: Tensor, first: int | None = None) -> None:
        """Offer `states` [n, d], any float dtype and device, numbered from `first` (default: on from the last).

        Raises:
            ValueError: another d, or a finite value that the reservoir's dtype cannot hold.
        """
        capacity, dim = self._slots.shape
        if states.ndim != 2 or states.shape[1] != dim:
            raise ValueError(f"wanted states [n, {dim}], got {list(states.shape)}")
        states = states.detach()
        first = self._next if first is None else first
        numbers = torch.arange(first, first + len(states))
        priorities = priorities_of(numbers, self.seed)
        room = min(capacity - len(self.numbers), len(states))
        if room:
            self._store(slice(len(self.numbers), len(self.numbers) + room), states[:room])
            self.numbers = torch.cat([self.numbers, numbers[:room]])
            self._priorities = torch.cat([self._priorities, priorities[:room]])
        self._replace(states[room:], numbers[room:], priorities[room:])
        self.seen += len(states)
        self._next = first + len(states)

    def cut(self, first: int) -> None:
        """Forget the rows numbered from `first` on; none of those kept may have been pushed out by them."""
        stay = (self.numbers < first).nonzero().squeeze(1)
        sort_rows(self._slots, stay)
        self.numbers, self._priorities = self.numbers[stay], self._priorities[stay]

    def states(self) -> Tensor:
        """The sample [min(seen, capacity), d] in the order of its numbers: a view, which a later `add` changes."""
        order = self.numbers.argsort()
        sort_rows(self._slots, order)
        self.numbers, self._priorities = self.numbers[order], self._priorities[order]
        return self._slots[: len(order)]

    def _replace(self, states: Tensor, numbers: Tensor, priorities: Tensor) -> None:
        """Of a full reservoir and `states` keep the rows of least priority."""
        if not len(states):
            return
        rows = (priorities < self._priorities.max()).nonzero().squeeze(1)  # soon only a few of a batch
        capacity = len(self._priorities)
        kept = torch.cat([self._priorities, priorities[rows]]).topk(capacity, largest=False).indices
        free = torch.ones(capacity, dtype=torch.bool).index_fill_(0, kept[kept < capacity], False).nonzero().squeeze(1)
        rows = rows[kept[kept >= capacity] - capacity]
        if len(rows):
            self._store(free, states[rows.to(states.device)])
            self.numbers[free], self._priorities[free] = numbers[rows], priorities[rows]

    def _store(self, slots: slice | Tensor, states: Tensor) -> None:
        stored = states.to("cpu", self._slots.dtype)
        infinite = stored.isinf()
        if bool(infinite.any()) and bool(states.isfinite().cpu()[infinite].any()):
            raise ValueError(
                f"a hidden state of {float(states.nan_to_num(0, 0, 0).abs().max()):.3g} does not fit "
                f"{self._slots.dtype}: normalize the states or use a reservoir of torch.float32"
            )
        self._slots[slots] = stored


def priorities_of(numbers: Tensor, seed: int) -> Tensor:
    """A random-looking number for every row: int64 [n], different for different `numbers` [n] of one seed.

    splitmix64 (Steele, Lea and Flood 2014), whose state is the row's number after a start that depends on the seed.
    """
    z = numbers * _GOLDEN + int(_mixed(torch.tensor([seed]))[0])
    return _mixed(z)


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as the signed integers that torch has


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shifted(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # torch's shift of a negative number fills with ones


def sort_rows(rows: Tensor, order: Tensor) -> None:
    """Put `rows[order]` [m, d] into the first m rows, in place: a few columns at a time, without a copy of all."""
    if bool((order == torch.arange(len(order))).all()):
        return
    width = max(1, CHUNK_BYTES // (rows.element_size() * max(1, len(order))))
    for columns in rows.split(width, dim=1):
        columns[: len(order)] = columns[order]


def survivors(numbers: Sequence[Tensor], capacity: int, seed: int) -> list[Tensor]:
    """Which of several processes' kept rows are in the sample of all: indices into each `numbers[r]` [m_r]."""
    priorities = [priorities_of(mine, seed) for mine in numbers]
    everything = torch.cat(priorities)
    if len(everything) <= capacity:
        return [torch.arange(len(mine)) for mine in numbers]
    last = everything.kthvalue(capacity).values
    return [(mine <= last).nonzero().squeeze(1) for mine in priorities]


def rows_within(memory_limit: int, *, dims: Sequence[int], wanted: int, itemsize: int, num_centers: int = 8) -> int:
    """Rows per block, `wanted` at most, such that sampling and clustering stay within `memory_limit` bytes.

    rows * (itemsize * sum(dims) + 16 * len(dims)) + working_memory(rows, max(dims), num_centers) <= memory_limit
    (`dims`: hidden size of each block; the blocks are clustered one after the other).

    Raises:
        ValueError: not even `num_centers` rows fit.
    """
    if not dims:
        raise ValueError("dims: wanted the hidden size of at least one block")
    fixed = working_memory(0, max(dims), num_centers)
    per_row = itemsize * sum(dims) + BOOKKEEPING * len(dims) + working_memory(1, max(dims), num_centers) - fixed
    rows = min(wanted, (memory_limit - fixed) // per_row)
    if rows < min(wanted, num_centers):
        raise ValueError(
            f"a memory limit of {memory_limit:,} bytes holds no sample of {num_centers} rows for "
            f"{len(dims)} block(s): {fixed + num_centers * per_row:,} bytes are needed"
        )
    return rows

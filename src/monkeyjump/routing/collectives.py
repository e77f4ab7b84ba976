"""What the processes of a distributed run tell each other about routing.

The maths takes these operations as arguments, so none of it asks whether other processes exist: `Ranks` is a
run of one process, `ProcessGroup` one of several. Every operation is a collective: all ranks call it, in the
same order. What differs in size from rank to rank is announced before it travels, so that no rank waits for a
message of another shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)  # for one answer: a batch of a slow rank, or the k-means of one block


class Ranks:
    """A run of one process: every sum is its own, every answer its own."""

    rank, size = 0, 1

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Element-wise sums over ranks of tensors whose shapes and dtype agree between ranks."""
        return tensors

    def exchange(self, mine: T) -> list[T]:
        """What every rank says, by rank."""
        return [mine]

    def together(self, work: Callable[[], T]) -> T:
        """Do `work`; where it fails on any rank, all of them raise."""
        return work()

    def collect(self, rows: Tensor, sizes: list[int], to: int) -> Tensor | None:
        """The rows `[sizes[r], d]` of all ranks, one rank after the other, on rank `to`; None elsewhere."""
        return rows


class ProcessGroup(Ranks):
    """The ranks of a torch process group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        flat = torch.cat([t.flatten().to(tensors[0].device) for t in tensors])  # one message for all blocks
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.device) for part, t in zip(parts, tensors)]

    def exchange(self, mine: T) -> list[T]:
        said: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(said, mine, group=self.group)
        except RuntimeError as error:  # connection closed, or no answer in time
            raise RuntimeError(
                f"rank {self.rank} got no answer from the other ranks: one of them has stopped, or does not take part "
                f"in this call, which every rank must make ({error})"
            ) from error
        return said

    def together(self, work: Callable[[], T]) -> T:
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(said):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed, so rank {self.rank} stops, too: {message}")
        return result

    def collect(self, rows: Tensor, sizes: list[int], to: int) -> Tensor | None:
        if self.rank != to:
            if len(rows):
                dist.send(rows.contiguous(), to, group=self.group)
            return None
        merged = rows.new_empty(sum(sizes), rows.shape[1])
        for rank, part in enumerate(merged.split(sizes)):
            if rank == to:
                part.copy_(rows)
            elif len(part):
                dist.recv(part, rank, group=self.group)
        return merged


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def all_ranks() -> Ranks:
    """All processes of this run, over its own backend: for tensors that stay on their device.

    Ranks that see the same tokens (of a tensor-parallel group) need no group of their own: each token then
    counts equally often, which leaves a mean as it is.
    """
    return Ranks() if _is_alone() else ProcessGroup()


@contextmanager
def host_ranks() -> Iterator[Ranks]:
    """All processes of this run, for host memory: a gloo group that is given back at the end."""
    if _is_alone():
        yield Ranks()
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield ProcessGroup(group)
    finally:
        dist.destroy_process_group(group)

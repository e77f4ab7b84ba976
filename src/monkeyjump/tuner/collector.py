"""The hidden states that `initialize_centers` clusters: read in rounds, on one rank or several, within bounds.

    round 0:  batch 0 of rank 0, batch 0 of rank 1, ...      round 1:  batch 1 of rank 0, batch 1 of rank 1, ...

The b-th batch in this order has b * 2^32 + i as the number of its i-th state of a block. That number alone decides
whether a limited sample keeps the state (`Reservoir`), and k-means gets the sample in the order of the numbers: the
ranks find what one process finds that reads the same batches in this order. A rank whose share has ended takes part
in the rounds without a batch. Where `max_tokens` and `memory_limit` both bite, a few states of the last round that
turn out to be past `max_tokens` may have pushed others out of a rank's sample, which is then smaller by as many.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monkeyjump.routing.collectives import Ranks
from monkeyjump.routing.reservoir import Reservoir, rows_within, sort_rows, survivors
from monkeyjump.tuner.batches import forward_inputs
from monkeyjump.tuner.model import routing_inputs
from monkeyjump.tuner.router import Router

logger = logging.getLogger("monkeyjump")
STATES_OF_A_BATCH = 2**32  # more than any batch has


@dataclass(frozen=True)
class Taken:
    """What one rank read in one round: rows, and states of every block."""

    rows: int
    states: list[int]


class Collector:
    """Observer of the routers: a reservoir of states for each block and adapter.

    Attributes:
        kept: most states that a block keeps, over all ranks.
        rows, totals: rows read, and states of each block, over all ranks and within the limits.
    """

    def __init__(
        self,
        waiting: list[tuple[Router, str]],
        max_tokens: int | None,
        max_samples: int | None,
        memory: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.waiting, self.ranks, self.seed = waiting, ranks, seed
        self.max_tokens, self.max_samples = max_tokens, max_samples
        dims = [router.dim for router, _ in waiting]
        wanted = max_tokens or 1_000_000
        exact = rows_within(memory, dims=dims, wanted=wanted, itemsize=4)
        # unit vectors lose nothing that matters in float16; raw states may overflow it
        unit = all(router.configs[adapter].similarity == "cosine" for router, adapter in waiting)
        halved = rows_within(memory, dims=dims, wanted=wanted, itemsize=2) if unit else exact
        dtype = torch.float32 if exact == halved else torch.float16
        self.kept = max(exact, halved)
        if self.kept < wanted and max_tokens is not None:
            logger.warning("memory_limit keeps %d of %d states per block, a uniform sample", self.kept, wanted)
        self._reservoirs: list[Reservoir | None] = [Reservoir(self.kept, dim, seed=seed, dtype=dtype) for dim in dims]
        self._places = {(router.name, adapter): place for place, (router, adapter) in enumerate(waiting)}
        self.rows, self.totals = 0, [0] * len(waiting)
        self._batches, self._first, self._taken = 0, 0, [0] * len(waiting)  # batches read; this rank's present one

    @property
    def seen(self) -> int:
        return min(self.totals)

    def full(self) -> bool:
        enough_tokens = self.max_tokens is not None and self.seen >= self.max_tokens
        return enough_tokens or (self.max_samples is not None and self.rows >= self.max_samples)

    # ------------------------------------------------------------------ reading

    @contextmanager
    def attached(self) -> Iterator[None]:
        for router, _ in self.waiting:
            router.observers.append(self)
        try:
            yield
        finally:
            for router, _ in self.waiting:
                router.observers.remove(self)

    def round(self, model: nn.Module, batches: Iterator[Mapping[str, Any]]) -> bool:
        """Read the next batch of every rank that has one; False where none has."""
        batch = self.ranks.together(lambda: next(batches, None))
        having = self.ranks.exchange(batch is not None)
        self._first = (self._batches + sum(having[: self.ranks.rank])) * STATES_OF_A_BATCH
        self._batches, self._taken = self._batches + sum(having), [0] * len(self.waiting)
        taken = self.ranks.together(lambda: None if batch is None else self._read(model, batch))
        for rank, one in enumerate(self.ranks.exchange(taken)):
            if one is not None:
                self._settle(rank, one)
        return any(having)

    def _read(self, model: nn.Module, batch: Mapping[str, Any]) -> Taken:
        inputs, told = forward_inputs(model, batch)
        with routing_inputs(model, **told):
            model(**inputs)
        rows = len(inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values())))
        return Taken(rows, self._taken)

    def __call__(self, router: Router, adapter: str, states: Tensor, chosen: Tensor, attended: Tensor | None) -> None:
        place = self._places.get((router.name, adapter))
        if place is None:
            return
        flat = states.flatten(0, 1) if attended is None else states[attended]
        if router.configs[adapter].similarity == "cosine":
            flat = F.normalize(flat.float(), dim=-1)
        if self.max_tokens is not None:
            flat = flat[: max(0, self.max_tokens - self.totals[place] - self._taken[place])]
        reservoir = self._reservoirs[place]
        assert reservoir is not None
        reservoir.add(flat, self._first + self._taken[place])
        self._taken[place] += len(flat)

    def _settle(self, rank: int, taken: Taken) -> None:
        """Count a rank's batch as far as the limits allow after the batches before it, and drop the rest."""
        if self.full():
            allowed = [0] * len(self.totals)
        elif self.max_tokens is None:
            allowed, self.rows = taken.states, self.rows + taken.rows
        else:
            allowed = [min(n, self.max_tokens - total) for n, total in zip(taken.states, self.totals)]
            self.rows += taken.rows
        self.totals = [total + n for total, n in zip(self.totals, allowed)]
        if rank == self.ranks.rank:
            for reservoir, n, read in zip(self._reservoirs, allowed, taken.states):
                if n < read and reservoir is not None:
                    reservoir.cut(self._first + n)

    # ------------------------------------------------------------------ the sample of all ranks

    def sample(self, place: int, to: int) -> Tensor | None:
        """The states `[min(seen, kept), d]` of one block on rank `to`, None elsewhere; frees this rank's own."""
        reservoir, self._reservoirs[place] = self._reservoirs[place], None
        assert reservoir is not None
        states = reservoir.states()
        numbers = self.ranks.exchange(reservoir.numbers)
        staying = survivors(numbers, self.kept, self.seed)
        mine = staying[self.ranks.rank]
        if len(mine) < len(states):
            states = states[mine]
        merged = self.ranks.collect(states, [len(rows) for rows in staying], to)
        if merged is not None:
            sort_rows(merged, torch.cat([n[rows] for n, rows in zip(numbers, staying)]).argsort())
        return merged

"""`initialize_centers`: one pass over data with the frozen backbone, then k-means for every block (§3.2)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from monkeyjump.routing.collectives import Ranks, host_ranks
from monkeyjump.routing.kmeans import kmeans
from monkeyjump.tuner.batches import batches_of, identity
from monkeyjump.tuner.collector import Collector
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.router import LATE_INITS, Router

DISTANCES = {"cosine": "cosine", "dot": "euclidean", "euclidean": "euclidean", "l1": "l1"}


@dataclass(frozen=True)
class Initialization:
    """What `initialize_centers` did.

    Attributes:
        seen: states (tokens, or sequences in the sequence modes) that the backbone produced.
        kept: states per block that k-means worked on.
        inertia: k-means objective by block; empty for `random_tokens`.
    """

    seen: int
    kept: int
    inertia: dict[str, float]


def initialize_centers(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    max_tokens: int | None = 50_000,
    max_samples: int | None = None,
    iterations: int = 50,
    restarts: int = 4,
    batch_size: int = 8,
    memory_limit: int | str = "4GB",
    seed: int = 0,
    progress: bool = True,
) -> Initialization:
    """Fit the centers of every routed block to the hidden states of training data.

    The adapters are off, the model is in evaluation mode and nothing is learned; global random
    states and the model's modes are left as they were. In the sequence modes the states are the
    sequence representations.

    In a distributed run (torch.distributed is initialized) every rank calls this, before the model is sharded,
    and gets the same centers, bit for bit: those that one process finds that reads batch j of rank 0, of
    rank 1, and so on, and then batch j + 1 (docs/distributed.md). An error on one rank is raised on all.

    Args:
        model: a model with routed adapters; one wrapped by DDP is looked through.
        data: a DataLoader (or any iterable) of batches; a data set of rows with `input_ids`
            (and `attention_mask`, `labels`), of which a seeded random subset is drawn; or a list
            of texts together with `tokenizer`. On several ranks: batches are this rank's share, however
            many they are; rows and texts are given whole to every rank, and divided here.
        max_tokens: stop after so many attended tokens (sequences in the sequence modes) of all ranks; None: no
            limit.
        max_samples: stop after so many rows of all ranks; None: no limit.
        iterations, restarts, seed: of k-means; one start alone costs more than any sample size
            (docs/centers.md).
        batch_size: rows per forward pass, where `data` is not batched yet.
        memory_limit: bytes of host memory for the states of all blocks and for k-means, as a number
            or "4GB". Where the tokens do not fit, every block keeps a uniform sample of them
            (docs/centers.md says what that costs).
        progress: show a progress bar.

    Raises:
        ValueError: no adapter waits for data, no data came, there are fewer distinct states than centers, or
            ranks were called with different settings.
        RuntimeError: another rank failed, or did not answer.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model  # its forward waits for all ranks

    def prepare() -> tuple[Collector, dict[str, Any]]:
        waiting = _waiting(model)
        for name, value in (("max_tokens", max_tokens), ("max_samples", max_samples)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} is out of range: use an integer of at least 1, or None")
        collector = Collector(waiting, max_tokens, max_samples, _bytes(memory_limit), seed, ranks)
        settings = {"max_tokens": max_tokens, "max_samples": max_samples, "states kept": collector.kept, "seed": seed}
        settings |= {"iterations": iterations, "restarts": restarts, "batch_size": batch_size}
        return collector, {**settings, "the rows of data": identity(data), "the adapters": _described(waiting)}

    with host_ranks() as ranks:
        collector, settings = ranks.together(prepare)
        _check_equal(ranks.exchange(settings))
        shown = progress and ranks.rank == 0
        unit = "token" if max_tokens else "row"
        bar = tqdm(total=max_tokens or max_samples, desc="centers: states", unit=unit, disable=not shown)
        with bar, torch.random.fork_rng(), frozen_backbone(model), collector.attached():
            batches = ranks.together(lambda: batches_of(data, tokenizer, batch_size, seed, ranks.rank, ranks.size))
            while collector.round(model, batches) and not collector.full():
                bar.update((collector.seen if max_tokens else collector.rows) - bar.n)
        return _fit(collector, ranks, iterations, restarts, seed, shown)


def _waiting(model: nn.Module) -> list[tuple[Router, str]]:
    """The routers and active adapters whose centers come from data."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("the model is sharded already; call initialize_centers before fully_shard, prepare or train")
    waiting = [
        (router, adapter)
        for router in routers(model)
        for adapter in router.active_adapters
        if adapter in router.centers and router.configs[adapter].center_init in LATE_INITS
    ]
    if not waiting:
        starts = {
            c.center_init if c.granularity != "task" else "none" for r in routers(model) for c in r.configs.values()
        }
        raise ValueError(f"no active adapter needs data for its centers (center_init: {', '.join(sorted(starts))})")
    return waiting


def _described(waiting: list[tuple[Router, str]]) -> list[str]:
    return [f"{r.name} ({a}) {list(r.centers[a].shape)} {r.configs[a].center_init}" for r, a in waiting]


def _check_equal(said: list[dict[str, Any]]) -> None:
    for rank, theirs in enumerate(said):
        for name in [n for n, value in theirs.items() if value != said[0][n]]:
            raise ValueError(
                f"initialize_centers: {name} differs between ranks: {said[0][name]} on rank 0, {theirs[name]} on rank "
                f"{rank}; pass the same, a data set of rows as a whole (it is divided here), shares of it as loaders"
            )


def _fit(collector: Collector, ranks: Ranks, iterations: int, restarts: int, seed: int, shown: bool) -> Initialization:
    """K-means of every block, `ranks.size` blocks at a time, each on one rank; all ranks get the same bits."""
    if collector.seen == 0:
        raise ValueError(
            "data is empty, or gave no attended token; pass at least one batch, row with input_ids, or text with "
            "tokenizer="
        )

    def fit(place: int, states: Tensor) -> tuple[Tensor, float | None]:
        router, adapter = collector.waiting[place]
        config, count = router.configs[adapter], router.centers[adapter].shape[0]
        if config.center_init == "random_tokens":
            return _distinct_states(states, count, seed + place, router.name), None
        result = kmeans(
            states,
            count,
            distance=DISTANCES[config.similarity],  # type: ignore[arg-type]
            iterations=iterations,
            restarts=restarts,
            seed=seed + place,
            name=router.name,
        )
        return result.centers, result.inertia

    fitted: list[tuple[Tensor, float | None]] = []
    places = range(len(collector.waiting))
    for first in tqdm(places[:: ranks.size], desc="centers: k-means", disable=not shown):
        at_once = places[first : first + ranks.size]
        samples = [collector.sample(place, to=rank) for rank, place in enumerate(at_once)]
        mine = [(place, states) for place, states in zip(at_once, samples) if states is not None]
        done = ranks.together(lambda mine=mine: [fit(*one) for one in mine])  # type: ignore[misc]
        fitted += [one for answer in ranks.exchange(done) for one in answer]
    inertia = {}
    for (router, adapter), (centers, cost) in zip(collector.waiting, fitted):  # all of them or none
        router.set_centers(adapter, centers)
        if cost is not None:
            inertia[router.name] = cost
    return Initialization(collector.seen, min(collector.seen, collector.kept), inertia)


def _distinct_states(states: Tensor, count: int, seed: int, name: str) -> Tensor:
    """`count` different rows of `states`, drawn at random: `[count, d]`."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))
    chosen: list[Tensor] = []
    for row in states[order].float():
        if row.isfinite().all() and row.any() and not any(torch.equal(row, other) for other in chosen):
            chosen.append(row)
        if len(chosen) == count:
            return torch.stack(chosen)
    raise ValueError(
        f"{name}: {len(chosen)} distinct states for {count} centers; give more data, or set num_centers={len(chosen)}"
    )


@contextmanager
def frozen_backbone(model: nn.Module) -> Iterator[None]:
    """The base model as it was before adapters: evaluation mode, adapters off, no gradients."""
    training = {module: module.training for module in model.modules()}
    adapted = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    disabled = {module: module._disable_adapters for module in adapted}
    model.eval()
    for module in adapted:
        # PEFT's own switch would also turn gradients on again for adapters loaded for inference
        module._disable_adapters = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in disabled.items():
            module._disable_adapters = was
        for module, was in training.items():
            module.training = was


def _bytes(limit: int | str) -> int:
    """A number of bytes from `4_000_000_000`, `"4GB"` or `"512 MB"`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?)B?|B?)\s*", str(limit).upper())
    if found is None:
        raise ValueError(f"memory_limit={limit!r} is no size; write a number of bytes, or such as '4GB' or '4GiB'")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " "))

"""`initialize_centers`: one pass over data with the frozen backbone, then k-means for every block (§3.2)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from monkeyjump.routing.kmeans import kmeans
from monkeyjump.routing.reservoir import Reservoir, rows_within
from monkeyjump.tuner.batches import batches_of, forward_inputs
from monkeyjump.tuner.model import routers, routing_inputs
from monkeyjump.tuner.router import LATE_INITS, Router

logger = logging.getLogger("monkeyjump")
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

    Args:
        model: a model with routed adapters.
        data: a DataLoader (or any iterable) of batches; a data set of rows with `input_ids`
            (and `attention_mask`, `labels`), of which a seeded random subset is drawn; or a list
            of texts together with `tokenizer`.
        max_tokens: stop after so many attended tokens (sequences in the sequence modes); None: no limit.
        max_samples: stop after so many rows; None: no limit.
        iterations, restarts, seed: of k-means; one start alone costs more than any sample size
            (docs/centers.md).
        batch_size: rows per forward pass, where `data` is not batched yet.
        memory_limit: bytes of host memory for the states of all blocks and for k-means, as a number
            or "4GB". Where the tokens do not fit, every block keeps a uniform sample of them
            (docs/centers.md says what that costs).
        progress: show a progress bar.

    Raises:
        ValueError: no adapter waits for data, no data came, or there are fewer distinct states
            than centers.
    """
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
    for name, value in (("max_tokens", max_tokens), ("max_samples", max_samples)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} is out of range: use an integer of at least 1, or None")
    collector = _Collector(waiting, max_tokens, max_samples, _bytes(memory_limit), seed)
    unit = "token" if max_tokens else "row"
    bar = tqdm(total=max_tokens or max_samples, desc="centers: states", unit=unit, disable=not progress)
    with bar, torch.random.fork_rng(), frozen_backbone(model), collector.attached():
        for batch in batches_of(data, tokenizer, batch_size, seed):
            inputs, told = forward_inputs(model, batch)
            with routing_inputs(model, **told):
                model(**inputs)
            collector.rows += len(inputs["input_ids"] if "input_ids" in inputs else next(iter(inputs.values())))
            bar.update((collector.seen if max_tokens else collector.rows) - bar.n)
            if collector.full():
                break
    return _fit(collector, iterations, restarts, seed, progress)


class _Collector:
    """Observer of the routers: a reservoir of states for each block and adapter."""

    def __init__(
        self,
        waiting: list[tuple[Router, str]],
        max_tokens: int | None,
        max_samples: int | None,
        memory: int,
        seed: int,
    ) -> None:
        self.waiting, self.max_tokens, self.max_samples = waiting, max_tokens, max_samples
        self.rows = 0
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
        self.reservoirs = {
            (router.name, adapter): Reservoir(self.kept, router.dim, seed=seed, dtype=dtype)
            for router, adapter in waiting
        }

    def __call__(self, router: Router, adapter: str, states: Tensor, chosen: Tensor, attended: Tensor | None) -> None:
        reservoir = self.reservoirs.get((router.name, adapter))
        if reservoir is not None:
            flat = states.flatten(0, 1) if attended is None else states[attended]
            if router.configs[adapter].similarity == "cosine":
                flat = F.normalize(flat.float(), dim=-1)
            if self.max_tokens is not None:
                flat = flat[: self.max_tokens - reservoir.seen]
            reservoir.add(flat)

    @contextmanager
    def attached(self) -> Iterator[None]:
        for router, _ in self.waiting:
            router.observers.append(self)
        try:
            yield
        finally:
            for router, _ in self.waiting:
                router.observers.remove(self)

    @property
    def seen(self) -> int:
        return min(reservoir.seen for reservoir in self.reservoirs.values())

    def full(self) -> bool:
        enough_tokens = self.max_tokens is not None and self.seen >= self.max_tokens
        return enough_tokens or (self.max_samples is not None and self.rows >= self.max_samples)


def _fit(collector: _Collector, iterations: int, restarts: int, seed: int, progress: bool) -> Initialization:
    if collector.seen == 0:
        raise ValueError("data gave no attended token; pass rows with input_ids, or texts with tokenizer=")
    seen, inertia, fitted = collector.seen, {}, []
    for number, (router, adapter) in enumerate(tqdm(collector.waiting, desc="centers: k-means", disable=not progress)):
        config = router.configs[adapter]
        states = collector.reservoirs.pop((router.name, adapter)).states()  # freed block by block
        count = router.centers[adapter].shape[0]
        if config.center_init == "random_tokens":
            centers = _distinct_states(states, count, seed + number, router.name)
        else:
            result = kmeans(
                states,
                count,
                distance=DISTANCES[config.similarity],  # type: ignore[arg-type]
                iterations=iterations,
                restarts=restarts,
                seed=seed + number,
                name=router.name,
            )
            centers, inertia[router.name] = result.centers, result.inertia
        fitted.append(centers)
    for (router, adapter), centers in zip(collector.waiting, fitted):  # all of them or none
        router.set_centers(adapter, centers)
    return Initialization(seen, min(seen, collector.kept), inertia)


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

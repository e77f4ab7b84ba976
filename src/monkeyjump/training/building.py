"""From a run's config to its model: base, adapter, centers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from monkeyjump import initialize_centers
from monkeyjump.training.adapters import adapter_config, add_adapter
from monkeyjump.training.config import Centers, RunConfig
from monkeyjump.training.data import describe
from monkeyjump.training.models import load
from monkeyjump.tuner.router import LATE_INITS, Router


class Rows(Protocol):
    """Encoded rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def build_model(config: RunConfig, place: str, total_steps: int | None = None) -> Any:
    """A newly read base with an adapter drawn from `train.seed`: no run sees what another left behind."""
    base = load(config.model, place)
    adapter = adapter_config(config.method, base, total_steps, [task.name for task in describe(config.data)])
    transformers.set_seed(config.train.seed)
    return add_adapter(base, adapter, place)


def needs_centers(model: nn.Module) -> bool:
    """Whether k-means, or a draw of tokens, must come before training."""
    return any(
        not router.ready[adapter]
        for router in model.modules()
        if isinstance(router, Router)
        for adapter, config in router.configs.items()
        if config.center_init in LATE_INITS
    )


def start_centers(
    model: Any, rows: Rows, collate: Callable[..., Any], centers: Centers, progress: bool = False
) -> None:
    """k-means over a random part of the training rows, where the method asks for it."""
    if not needs_centers(model):
        return
    initialize_centers(
        model,
        own_share(batches(rows, collate, centers.seed)),
        max_tokens=centers.max_tokens,
        max_samples=centers.max_samples,
        iterations=centers.iterations,
        restarts=centers.restarts,
        seed=centers.seed,
        progress=progress,
    )


def own_share(all_batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of several ranks that read the same batches, every one takes its turn."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return all_batches
    return islice(all_batches, torch.distributed.get_rank(), None, torch.distributed.get_world_size())


def batches(rows: Rows, collate: Callable[..., Any], seed: int, size: int = 8) -> Iterator[dict[str, Any]]:
    """Batches in a seeded random order: a reading that stops early has seen all tasks."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    loader: Any = DataLoader(rows, batch_size=size, sampler=order, collate_fn=collate)  # type: ignore[arg-type]
    for batch in loader:
        yield {name: value for name, value in batch.items() if name != "row_ids"}

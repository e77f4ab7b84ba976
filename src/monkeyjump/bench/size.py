"""What does not vary from run to run: parameters and files. And k-means, which is run once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from monkeyjump import initialize_centers
from monkeyjump.bench.candidates import Candidate, build
from monkeyjump.bench.passes import tokens, vocabulary_of
from monkeyjump.bench.settings import Settings
from monkeyjump.tuner.model import routers


def sizes(candidate: Candidate) -> dict[str, int | None]:
    """Trainable and total parameters, bytes of all of them, bytes of the adapter's file (None: no adapter)."""
    parameters = list(candidate.model.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "total": sum(p.numel() for p in parameters),
        "model_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "adapter_bytes": None if candidate.optimizer is None else _file_bytes(candidate.model),
    }


def _file_bytes(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        # False: else PEFT asks the Hub whether the vocabulary has grown
        model.save_pretrained(folder, save_embedding_layers=False)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def kmeans_times(name: str, base: nn.Module, settings: Settings) -> dict[str, Any]:
    """Seconds of `initialize_centers` on random tokens, and of k-means alone per block.

    The pass over the data is timed on its own with centers that are drawn from the same states.
    """
    rows = -(-settings.center_tokens // settings.length)
    ids = tokens(vocabulary_of(base), rows, settings.length, settings.seed, settings.device)
    batches = [{"input_ids": part} for part in ids.split(settings.batch)]
    states, _ = _initialize(build(name, base, settings, "random_tokens"), batches, settings)
    both, blocks = _initialize(build(name, base, settings, "kmeans"), batches, settings)
    return {
        "candidate": name,
        "blocks": blocks,
        "tokens": settings.center_tokens,
        "states_seconds": states,
        "total_seconds": both,
        "seconds_per_block": max(0.0, both - states) / blocks,
    }


def _initialize(candidate: Candidate, batches: list[dict[str, Tensor]], settings: Settings) -> tuple[float, int]:
    """Seconds, and the blocks that were given centers."""
    start = time.perf_counter()
    initialize_centers(candidate.model, batches, max_tokens=settings.center_tokens, seed=settings.seed, progress=False)
    return time.perf_counter() - start, len(list(routers(candidate.model)))

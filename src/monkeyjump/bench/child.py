"""`python -m monkeyjump.bench.child NAME SETTINGS`: the peak memory of one candidate, as a line of JSON.

NAME is a candidate, SETTINGS the JSON of `Settings`. One process measures one candidate, because the peak
of a process never falls.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from monkeyjump.bench.candidates import build, load_base
from monkeyjump.bench.memory import peak_bytes
from monkeyjump.bench.passes import clear_gradients, loss_of, tokens, vocabulary_of
from monkeyjump.bench.settings import Settings, Shape

STEPS = 2  # the first one also sets up what a library sets up once


def settings_from(text: str) -> Settings:
    """The inverse of `json.dumps(asdict(settings))`."""
    fields: dict[str, Any] = json.loads(text)
    fields["shape"] = Shape(**fields["shape"])
    for name in ("targets", "candidates", "only"):
        fields[name] = tuple(fields[name])
    return Settings(**fields)


def measure(name: str, settings: Settings) -> dict[str, int]:
    """Bytes: `peak` after forward and backward, `before` that of the model alone."""
    candidate = build(name, load_base(settings), settings)
    ids = tokens(vocabulary_of(candidate.model), settings.memory_batch, settings.length, settings.seed, settings.device)
    before = peak_bytes(settings.device)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        loss_of(candidate.model, ids).backward()
        clear_gradients(candidate.model)
    return {"peak": peak_bytes(settings.device), "before": before}


def main() -> None:
    name, text = sys.argv[1:]
    settings = settings_from(text)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    print(json.dumps(measure(name, settings)))


if __name__ == "__main__":
    main()

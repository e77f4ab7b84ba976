"""A model before and after, on held-out text."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from monkeyjump.mamba.adapting.measures import efficiency, forward_peak, latency
from monkeyjump.mamba.order import fold
from monkeyjump.mamba.perplexity import perplexity
from monkeyjump.mamba.text_runs.windows import Windows, encode

BATCHES = 4  # of held-out windows, for accuracy


def held_out_batches(stream: np.ndarray, settings: Any, count: int = BATCHES) -> list[dict[str, torch.Tensor]]:
    """`[B, L]` token ids of the held-out stream; a text shorter than a window gives shorter rows."""
    length, size = min(settings.context_length, len(stream)), settings.batch_size
    windows = Windows(stream, length, count * size, settings.seed)
    rows = [windows[number]["input_ids"] for number in range(count * size)]
    return [{"input_ids": torch.stack(rows[start : start + size])} for start in range(0, len(rows), size)]


def before_and_after(
    dense: Any, model: Any, order: Any, tokenizer: Any, texts: list[str], settings: Any
) -> dict[str, Any]:
    """Held-out perplexity, latency, memory and efficiency of both models; latency also of the order alone."""
    batches = held_out_batches(encode(tokenizer, texts), settings)
    size, length = batches[0]["input_ids"].shape
    models = {"before": dense}
    if order is not None:
        models["order alone"] = copy.deepcopy(dense)
        fold(models["order alone"], order.orders)
    models["after"] = model
    stride = max(1, length // 2)
    scores = {
        name: perplexity(models[name], tokenizer, texts, max(2, length), stride, size).record()
        for name in ("before", "after")
    }
    return {
        "held_out": {"window": length, "stride": stride, **scores},
        "latency": latency(models, batches[0]),
        "forward_peak_bytes": {name: forward_peak(models[name], batches[0]) for name in ("before", "after")},
        "efficiency": {name: efficiency(models[name], batches) for name in ("before", "after")},
    }

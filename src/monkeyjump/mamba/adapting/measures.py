"""Numbers of a model before and after: latency, next-token accuracy, FLOPs, the efficiency score.

    log E = log accuracy - log FLOPs - log parameters

E is a ratio of three things in different units: it is given as its logarithm, beside its parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from monkeyjump.bench.timing import Work, interleaved, ratio
from monkeyjump.mamba.channels import channel_groups
from monkeyjump.mamba.evaluating import evaluating

ROUNDS = 7
SCAN_FLOPS = 7  # per channel, state and token: two products, exp, multiply-add of the state, read-out


def latency(models: Mapping[str, Any], batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of each model, in turn, and its ratio to the first: above 1 is faster."""
    works = {name: Work(lambda: None, partial(_timed, model, batch)) for name, model in models.items()}
    seconds = interleaved(works, ROUNDS, warmup=2)
    first = seconds[next(iter(models))]
    found = {}
    for name, own in seconds.items():
        speed = ratio(first, own)
        middle = sorted(own)[len(own) // 2]
        found[name] = {"ms": 1e3 * middle, "speed": speed.median, "low": speed.low, "high": speed.high}
    return found


def _timed(model: Any, batch: dict[str, Tensor], _: Any) -> Tensor:
    return _forward(model, batch)


@torch.no_grad()
def _forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with evaluating(model):
        return model(input_ids=batch["input_ids"], use_cache=False).logits


def efficiency(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Accuracy over the batches, FLOPs of a token's forward pass, parameters, and log E of them."""
    right = counted = 0
    for batch in batches:
        guesses = _forward(model, batch)[:, :-1].argmax(-1)
        right += int((guesses == batch["input_ids"][:, 1:]).sum())
        counted += guesses.numel()
    with FlopCounterMode(display=False) as counter:
        _forward(model, batches[0])
    flops = counter.get_total_flops() / batches[0]["input_ids"].numel() + _scan_flops(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    accuracy = right / counted
    score = math.log(accuracy) - math.log(flops) - math.log(parameters) if accuracy else -math.inf
    return {"accuracy": accuracy, "flops_per_token": flops, "parameters": parameters, "log_efficiency": score}


def _scan_flops(model: Any) -> float:
    """Of a token; the counter does not see inside a scan. Widths count as they are, masks do not."""
    groups = channel_groups(model, mlps=False).values()
    return sum(SCAN_FLOPS * group.units * group.width * group.block.ssm_state_size for group in groups)

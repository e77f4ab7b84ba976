"""Numbers of a model before and after; docs/mamba/adapting.md defines each.

    log E = log accuracy - log FLOPs - log parameters

E is a ratio of three things in different units: it is given as its logarithm, beside its parts.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from monkeyjump.allocation import PeftPlan
from monkeyjump.allocation.matrices import known_matrices
from monkeyjump.bench.timing import Work, interleaved, ratio
from monkeyjump.mamba.evaluating import evaluating
from monkeyjump.mamba.flops import forward_flops

ROUNDS = 7


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
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rows, length = batches[0]["input_ids"].shape
    accuracy, flops = right / counted, forward_flops(model, rows, length).total / (rows * length)
    score = math.log(accuracy) - math.log(flops) - math.log(parameters) if accuracy else -math.inf
    return {"accuracy": accuracy, "flops_per_token": flops, "parameters": parameters, "log_efficiency": score}


def adapter_flops(model: Any, plan: PeftPlan) -> int:
    """What adapters on the weights add to a forward pass, whatever its tokens: `B A` of LoRA, the product of IA³."""
    matrices = known_matrices(model, [one.name for one in plan.modules], "plan")
    factor = {one.name: {"lora": 2 * one.rank, "ia3": 1, "frozen": 0}[one.kind] for one in plan.modules}
    return sum(factor[name] * matrix.d_out * matrix.d_in for name, matrix in matrices.items())


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the output layer reads, `[B, T, d]`."""
    with evaluating(model), torch.no_grad():
        return model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state


def preservation(masked: list[Tensor], whole: list[Tensor]) -> float:
    """Mean cosine between the hidden states of tokens, with and without masks: the same direction is 1."""
    return torch.cat([torch.cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(masked, whole)]).mean().item()


def forward_peak(model: Any, batch: dict[str, Tensor]) -> int:
    """Most bytes of tensors that a forward pass holds at once beside the weights; not what a kernel takes inside."""
    held = _Held(model)
    with held:
        _forward(model, batch)
    return held.peak


class _Held(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

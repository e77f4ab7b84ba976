"""AdaLoRA over mixtures: its rank allocation with the triplets of all experts of all layers in one budget.

PEFT's `RankAllocator` does the work. It knows parameters by the names of PEFT's AdaLoRA layers, so it is
shown ours under those: an adapted projection counts as one matrix of N r triplets, and the budget is
N times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn

from monkeyjump.moe.auxiliary import Seen
from monkeyjump.moe.losses import orthogonality

NAMES = {"mixture_A": "lora_A", "mixture_B": "lora_B", "mixture_E": "lora_E"}


class _AsAdaLora:
    """The experts' matrices under the names of PEFT's AdaLoRA."""

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.model, self.adapter = model, adapter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            path, _, adapter = name.rpartition(".")
            layer, _, kind = path.rpartition(".")
            if adapter == self.adapter and kind in NAMES:
                yield f"{layer}.{NAMES[kind]}.{adapter}", parameter


class ExpertRanks(RankAllocator):
    """The rank schedule of one adapter."""

    def __init__(self, model: nn.Module, config: Any, adapter: str) -> None:
        super().__init__(_AsAdaLora(model, adapter), config, adapter)
        self.target_bgt *= config.num_experts

    def step(self, model: nn.Module, step: int) -> None:
        """After optimizer step `step` (counted from 1), while its gradients are there: score, and prune what is due."""
        config, view = self.peft_config, _AsAdaLora(model, self.adapter_name)
        last = config.total_step - config.tfinal
        if self.target_bgt == self.init_bgt:
            return  # nothing to prune; PEFT's allocator would ask for the smallest of no scores
        if step <= last:
            _, pattern = self.update_and_allocate(view, step, force_mask=step == last)
            config.kept_ranks = pattern or config.kept_ranks
        elif config.kept_ranks is not None:
            self._keep(view, config.kept_ranks)
        if step == last:
            self.reset_ipt()

    def _keep(self, view: _AsAdaLora, pattern: dict[str, list[bool]]) -> None:
        """Hold at zero what was pruned for good; the optimizer's averages would move it again."""
        for name, parameter in view.named_parameters():
            if name in pattern:
                left = torch.tensor(pattern[name], device=parameter.device).unsqueeze(-1)
                parameter.data.masked_fill_(~left, 0.0)


def expert_orthogonality(seen: Seen) -> Tensor:
    """`orthogonality` of every expert's P and Q."""
    seen.check_whole("orthogonality", "orth_reg_weight")
    adapter, matrices = seen.adapter, []
    for layer in seen.layers:
        matrices += [
            layer.per_expert(layer.mixture_A[adapter], adapter),
            layer.per_expert(layer.mixture_B[adapter].T, adapter),
        ]
    return orthogonality(matrices)

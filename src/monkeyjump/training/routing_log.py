"""Routing statistics while a run goes on, taken on one fixed batch of training rows.

usage/SLOT             share of the choices that went to an adapter, averaged over the blocks
routing/effective      exp of the entropy of a block's shares, averaged: adapters in effective use
routing/effective/TASK the same on the rows of one task; an average over tasks can hide that each collapses
routing/churn          share of the batch's tokens whose first choice changed since the last time (rule 12)
routing/drift          1 - cosine of each center with where it started, averaged
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from monkeyjump.routing.gates import similarity_logits
from monkeyjump.training.probe import forward
from monkeyjump.tuner.router import Router

CHOICES = "routing_choices.safetensors"


class RoutingLog:
    """Statistics of the active adapter of a routed model.

    Args:
        batch: of the run's collator; the same one for the whole run.
        names: of the tasks that its `task_ids` number.
        start: where each block's centers started; None: where they are now.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Any], names: list[str], start: dict[str, Tensor] | None = None
    ) -> None:
        self.model, self.batch, self.names = model, batch, names
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.start = centers_of(model) if start is None else start
        self.choices: dict[str, Tensor] = {}  # first choice of each token of the batch, by block

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """All statistics now; the choices are kept for the next time."""
        seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def observe(router: Router, adapter: str, states: Tensor, chosen: Tensor, attended: Tensor | None) -> None:
            first = _first_choice(router, adapter, states, chosen)
            here = torch.ones_like(first, dtype=torch.bool) if attended is None else attended.expand_as(first)
            seen[router.name] = (first.cpu(), chosen.cpu(), here.cpu())

        training = self.model.training
        self.model.eval()
        for router in self.routers:
            router.observers.append(observe)
        try:
            forward(self.model, self.batch)
        finally:
            for router in self.routers:
                router.observers.remove(observe)
            self.model.train(training)
        return {**self._usage(seen), **self._churn(seen), **self._drift()}

    def save(self, folder: Path) -> None:
        """Into a checkpoint, so that a resumed run's churn equals the uninterrupted one's."""
        if self.choices:
            save_file(self.choices, folder / CHOICES)

    def restore(self, folder: Path) -> None:
        if (folder / CHOICES).is_file():
            self.choices = load_file(folder / CHOICES)

    def _usage(self, seen: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        tasks = torch.as_tensor(self.batch["task_ids"]).cpu()
        shares: dict[str, list[float]] = {}
        effective: dict[str, list[float]] = {}
        for router in self.routers:
            if router.name not in seen:
                continue
            _, chosen, here = seen[router.name]
            adapter = router.active_adapters[0]
            counts = (chosen & here[..., None]).sum(1).double()  # [B, E]
            for slot, share in zip(router.slots[adapter], (counts.sum(0) / counts.sum().clamp(min=1)).tolist()):
                shares.setdefault(f"usage/{slot}", []).append(share)
            effective.setdefault("routing/effective", []).append(_effective(counts.sum(0)))
            for number in tasks.unique().tolist():
                name = f"routing/effective/{self.names[number]}"
                effective.setdefault(name, []).append(_effective(counts[tasks == number].sum(0)))
        return {name: sum(values) / len(values) for name, values in {**shares, **effective}.items()}

    def _churn(self, seen: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, float]:
        now = {name: first.where(here, -1) for name, (first, _, here) in seen.items()}
        before, self.choices = self.choices, now
        if not before:
            return {}
        changed = sum(int((now[name] != before[name]).sum()) for name in now)
        tokens = sum(int((choices >= 0).sum()) for choices in now.values())
        return {"routing/churn": changed / max(1, tokens)}

    def _drift(self) -> dict[str, float]:
        now = centers_of(self.model)
        cosines = [F.cosine_similarity(now[name], self.start[name], dim=-1).mean() for name in now]
        return {"routing/drift": 1 - torch.stack(cosines).mean().item()} if cosines else {}


def centers_of(model: nn.Module) -> dict[str, Tensor]:
    """Each block's centers `[C, d]`, copied to the CPU; none where routing is by task."""
    found = {}
    for router in (module for module in model.modules() if isinstance(module, Router)):
        adapter = router.active_adapters[0]
        holder = router.learned_centers if adapter in router.learned_centers else router.centers
        if adapter in holder:
            found[router.name] = holder[adapter].detach().float().cpu().clone()
    return found


def _first_choice(router: Router, adapter: str, states: Tensor, chosen: Tensor) -> Tensor:
    """`[B, T or 1]`: the most similar adapter; ties go to the lower slot, as in the routing itself."""
    config = router.configs[adapter]
    if config.granularity == "task":
        return chosen.int().argmax(-1)
    holder = router.learned_centers if adapter in router.learned_centers else router.centers
    centers = holder[adapter].to(states.device)
    logits = similarity_logits(states.float(), centers, config.similarity)
    own = torch.arange(chosen.shape[-1], device=logits.device) % centers.shape[0]
    return logits[..., own].argmax(-1)


def _effective(counts: Tensor) -> float:
    share = counts / counts.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())

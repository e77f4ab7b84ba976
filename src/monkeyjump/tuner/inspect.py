"""What a routed model is made of, and where its tokens go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from monkeyjump.tuner.block import ROUTER
from monkeyjump.tuner.model import routers
from monkeyjump.tuner.router import Router
from monkeyjump.tuner.targets import BlockPlan, block_index


@dataclass(frozen=True)
class RoutingPlan:
    """What an adapter does to a model.

    Attributes:
        adapter: its name.
        blocks: the routed blocks, with their routed and shared slots.
        plain: adapted modules outside routed blocks, by path.
        trainable_parameters, total_parameters: of the whole model.
    """

    adapter: str
    blocks: tuple[BlockPlan, ...]
    plain: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        lines = []
        for (routed, shared), count in Counter((b.routed, b.shared) for b in self.blocks).items():
            always = f"; on every token: {', '.join(shared)}" if shared else ""
            lines.append(f"{count} blocks route each token among {', '.join(routed)}{always}")
        if self.plain:
            lines.append(f"{len(self.plain)} adapted modules outside routed blocks")
        share = self.trainable_parameters / self.total_parameters
        lines.append(f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters train ({share:.3%})")
        return "\n".join(lines)


def describe_routing(model: nn.Module, adapter: str = "") -> RoutingPlan:
    """Blocks, routed and shared modules, and parameter counts of a routed model.

    `print` shows a summary; `blocks` (each with `name`, `routed` and `shared`), `plain`, `trainable_parameters` and
    `total_parameters` are there to be read.

    Args:
        adapter: which adapter; empty: the active one.
    """
    found = routers(model)
    adapter = adapter or found[0].active_adapters[0]
    prefix = {m: n for n, m in model.named_modules() if isinstance(m, Router)}
    blocks: list[BlockPlan] = []
    inside: set[str] = set()
    for router in found:
        if adapter not in router.slots:
            continue
        path = prefix[router].removesuffix(ROUTER)
        block = model.get_submodule(path.removesuffix("."))
        slots = [n for n, m in block.named_modules() if _is_adapted(m, adapter)]
        inside.update(path + slot for slot in slots)
        routed = router.slots[adapter]
        index = block_index(router.name)
        blocks.append(BlockPlan(router.name, index, routed, tuple(s for s in slots if s not in routed)))
    adapted = [n for n, m in model.named_modules() if _is_adapted(m, adapter)]
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    plain = tuple(n for n in adapted if n not in inside)
    return RoutingPlan(adapter, tuple(blocks), plain, counts[True], counts[True] + counts[False])


def _is_adapted(module: nn.Module, adapter: str) -> bool:
    if not isinstance(module, BaseTunerLayer) or isinstance(module, Router):
        return False
    return adapter in module._all_available_adapter_names()


@dataclass
class RoutingRecord:
    """Counts of one adapter's routing decisions.

    Attributes:
        slots: routed modules of each block.
        counts: `[E]` float64 per block: tokens (sequences in the sequence modes) for which each
            slot was among the chosen; padding never counts.
        tokens: tokens that each block routed.
    """

    adapter: str
    slots: dict[str, tuple[str, ...]] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def __call__(self, router: Router, adapter: str, states: Tensor, chosen: Tensor, attended: Tensor | None) -> None:
        if adapter != self.adapter:
            return
        rows = chosen.flatten(0, 1) if attended is None else chosen[attended]
        empty = torch.zeros(chosen.shape[-1], dtype=torch.float64)
        self.slots[router.name] = router.slots[adapter]
        self.counts[router.name] = self.counts.get(router.name, empty) + rows.double().sum(0).cpu()
        self.tokens[router.name] = self.tokens.get(router.name, 0) + len(rows)


@contextmanager
def record_routing(model: nn.Module, adapter: str = "") -> Iterator[RoutingRecord]:
    """Context: count where the tokens of every forward inside go.

    It gives a record whose dicts, by block, are `slots` (names of the routed modules), `counts` (`[E]` float64: the
    tokens, or sequences in the sequence modes, for which each slot was among the chosen) and `tokens` (how many there
    were). Padding never counts.

    Args:
        adapter: whose decisions; empty: the active adapter's.
    """
    found = routers(model)
    record = RoutingRecord(adapter or found[0].active_adapters[0])
    for router in found:
        router.observers.append(record)
    try:
        yield record
    finally:
        for router in found:
            router.observers.remove(record)

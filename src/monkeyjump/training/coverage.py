"""What an adapter touches: which projections of which blocks, routed, shared or neither, and what was missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from monkeyjump.tuner.inspect import describe_routing
from monkeyjump.tuner.router import Router
from monkeyjump.tuner.targets import BlockPlan, block_of, matches

SHORTHAND = "all-linear"


@dataclass(frozen=True)
class Coverage:
    """`adapted`, `plain`: module paths, all and those outside routed blocks. `missed`: names that match nothing.

    `uneven`: wanted name -> (blocks that have it, blocks of the model), where these differ.
    """

    trainable_parameters: int
    total_parameters: int
    blocks: tuple[BlockPlan, ...]
    adapted: tuple[str, ...]
    plain: tuple[str, ...]
    missed: tuple[str, ...]
    uneven: dict[str, tuple[int, int]]

    @property
    def routed(self) -> list[str]:
        return list(dict.fromkeys(slot for block in self.blocks for slot in block.routed))

    @property
    def shared(self) -> list[str]:
        return list(dict.fromkeys(slot for block in self.blocks for slot in block.shared))


def missed_names(model: nn.Module, options: dict[str, Any]) -> list[str]:
    """Names in target_modules and shared_modules that no module of the base model has."""
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for field in ("target_modules", "shared_modules"):
        wanted = options.get(field)
        if isinstance(wanted, str):
            whole = field == "target_modules"  # shared_modules matches within a block
            if wanted.lower() != SHORTHAND and whole and not any(matches(name, wanted) for name in names):
                found.append(wanted)
            continue
        found += [w for w in wanted or () if not any(matches(name, [w]) for name in names)]
    return list(dict.fromkeys(found))


def coverage(model: Any) -> Coverage:
    """Of a PEFT model and its active adapter. Raises ValueError where nothing is adapted."""
    base = model.get_base_model()
    config = model.active_peft_config
    adapted = [name for name, m in base.named_modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, Router)]
    if not adapted:
        raise ValueError(f"no module is adapted: target_modules={config.target_modules} matches none")
    blocks: tuple[BlockPlan, ...] = ()
    plain = tuple(adapted)
    if any(isinstance(m, Router) for m in base.modules()):
        plan = describe_routing(base)
        blocks, plain = plan.blocks, plan.plain
    trainable, total = 0, 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    wanted = config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else []
    return Coverage(trainable, total, blocks, tuple(adapted), plain, (), _uneven(base, sorted(wanted), adapted))


def _uneven(base: nn.Module, wanted: list[str], adapted: list[str]) -> dict[str, tuple[int, int]]:
    """Blocks without a wanted projection, among those that stand in one list with blocks that have it."""
    blocks = {block for name in adapted if (block := block_of(base, name)) is not None}
    lists = {block.rpartition(".")[0] for block in blocks}
    total = sum(len(list(base.get_submodule(name).children())) for name in lists)
    found = {}
    for name in wanted:
        having = {block_of(base, module) for module in adapted if matches(module, [name])} - {None}
        if having and len(having) < total:
            found[name] = (len(having), total)
    return found
